"use strict";

const SMALLEST_SIDE = 640; // smaller maps are enlarged by whole factors, which keeps their outlines thin
const FILL = 190, FADED = 50; // opacity of segments, and of the others beside the one under the pointer

// The segments of one canvas, drawn over the picture behind it.
class Drawing {
  constructor(canvas, picture) {
    this.canvas = canvas;
    this.width = canvas.width;
    this.height = canvas.height;
    this.segments = JSON.parse(canvas.dataset.segments); // [name, [red, green, blue], score or null]
    this.tag = canvas.parentElement.appendChild(document.createElement("output"));
    this.active = null; // the segment under the pointer
    canvas.parentElement.style.backgroundImage = `url(${picture.src})`;
  }

  async load() {
    const bytes = Uint8Array.from(atob(this.canvas.dataset.ids), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    this.ids = new Uint16Array(await new Response(stream).arrayBuffer());
    const scale = Math.ceil(SMALLEST_SIDE / Math.max(this.width, this.height));
    this.canvas.width = this.width * scale;
    this.canvas.height = this.height * scale;
    this.draw();
  }

  // The number of the segment at a place in 0..1; that of segments where there is none.
  at(x, y) {
    const column = Math.min(Math.max(Math.floor(x * this.width), 0), this.width - 1);
    const row = Math.min(Math.max(Math.floor(y * this.height), 0), this.height - 1);
    return this.ids[row * this.width + column];
  }

  draw() {
    const { width, height } = this.canvas;
    const image = new ImageData(width, height);
    const pixels = image.data;
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i += 4) {
        const id = this.at((x + 0.5) / width, (y + 0.5) / height);
        const right = this.at((x + 1.5) / width, (y + 0.5) / height);
        const below = this.at((x + 0.5) / width, (y + 1.5) / height);
        if (id !== right || id !== below) {
          pixels.fill(255, i, i + 4);
        } else if (id < this.segments.length) {
          pixels.set(this.segments[id][1], i);
          pixels[i + 3] = this.active === null || this.active === id ? FILL : FADED;
        }
      }
    }
    this.canvas.getContext("2d").putImageData(image, 0, 0);
  }

  // Shows the name of the segment at a place in 0..1.
  point(x, y) {
    if (!this.ids) return;
    const id = this.at(x, y);
    const [name, , score] = this.segments[id] ?? ["", [], null];
    this.tag.textContent = score === null ? name : `${name} ${score.toFixed(2)}`;
    this.tag.style.left = `${100 * x}%`;
    this.tag.style.top = `${100 * y}%`;
    this.activate(name ? id : null);
  }

  leave() {
    this.tag.textContent = "";
    this.activate(null);
  }

  activate(id) {
    if (this.active === id) return;
    this.active = id;
    this.draw();
  }
}

const loader = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    loader.unobserve(target);
    target.drawing.load();
  }
}, { rootMargin: "50%" });

for (const figure of document.querySelectorAll(".segments")) {
  const picture = figure.querySelector("img");
  const drawings = [...figure.querySelectorAll("canvas")].map((canvas) => {
    canvas.drawing = new Drawing(canvas, picture);
    loader.observe(canvas);
    return canvas.drawing;
  });
  const leave = () => drawings.forEach((drawing) => drawing.leave());
  figure.addEventListener("pointerleave", leave);
  figure.addEventListener("pointermove", (event) => {
    const view = event.target.closest(".view");
    if (!view) return leave();
    const box = view.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    drawings.forEach((drawing) => drawing.point(x, y));
  });
  figure.addEventListener("click", (event) => {
    if (event.target.closest(".view")) figure.classList.toggle("large");
  });
}

const strength = document.querySelector(".strength input");
strength?.addEventListener("input", () => document.documentElement.style.setProperty("--masks", strength.value));
