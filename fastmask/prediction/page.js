"use strict";

const SMALLEST_SIDE = 640; // smaller maps are enlarged by whole factors, which keeps their outlines thin
const FILL = 190, FADED = 50; // opacity of segments, and of the others beside the one under the pointer
const OUTLINE = 0xffff; // in place of a segment's number

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
    this.enlarge(Math.ceil(SMALLEST_SIDE / Math.max(this.width, this.height)));
    this.draw();
  }

  // Sets the canvas to a multiple of the map's size, and what each of its pixels shows.
  enlarge(scale) {
    const width = (this.canvas.width = this.width * scale), height = (this.canvas.height = this.height * scale);
    const at = (x, y) => this.at(x / width, y / height);
    this.places = new Uint16Array(width * height);
    for (let y = 0.5, i = 0; y < height; y++) {
      for (let x = 0.5; x < width; x++, i++) {
        const id = at(x, y);
        this.places[i] = id === at(x + 1, y) && id === at(x, y + 1) ? id : OUTLINE;
      }
    }
  }

  // The number of the segment at a place in 0..1; that of segments where there is none.
  at(x, y) {
    const column = Math.min(Math.max(Math.floor(x * this.width), 0), this.width - 1);
    const row = Math.min(Math.max(Math.floor(y * this.height), 0), this.height - 1);
    return this.ids[row * this.width + column];
  }

  draw() {
    const colors = new Uint32Array(OUTLINE + 1);
    colors[OUTLINE] = 0xffffffff;
    this.segments.forEach(([, [red, green, blue]], id) => {
      const opacity = this.active === null || this.active === id ? FILL : FADED;
      colors[id] = (opacity << 24) | (blue << 16) | (green << 8) | red;
    });
    const image = new ImageData(this.canvas.width, this.canvas.height);
    const pixels = new Uint32Array(image.data.buffer);
    this.places.forEach((place, i) => { pixels[i] = colors[place]; });
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
