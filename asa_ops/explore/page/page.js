// What the page shows, and what moves it. The survivors come from decode.js.

const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 73, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
];
const LOWEST = 0.3; // where on the ramp the smallest weight stands: darker colours drown in the picture
const BINS = 16; // of distances
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const FAR = 8; // pixels that an arrow key moves with Shift

const element = (id) => document.getElementById(id);
const header = JSON.parse(element("header").textContent);
const [height, width] = header.grid;
const cell = Math.max(1, Math.round(1024 / Math.max(height, width))); // pixels of the canvas a pixel of the map

// What is shown. Tests read it.
const state = { pixel: Math.floor(height / 2) * width + Math.floor(width / 2), alpha: 0, beta: 0, survivors: null };
globalThis.explore = { header, state, ready: false };

let graph = null;
let pictures = null; // the picture on canvases: dark and grey, and as it is
const surveys = new Map(); // by level, computed when first shown

/** Return the colour of a number from 0 to 1. */
function colour(t) {
  const at = Math.min(Math.max(t, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[low].map((x, i) => Math.round(x + (VIRIDIS[low + 1][i] - x) * (at - low)));
}

/** Return the colours from a number to 1 as a background. */
function ramp(from) {
  const shades = Array.from({ length: 19 }, (_, i) => `rgb(${colour(from + ((1 - from) * i) / 18)})`);
  return `linear-gradient(to right, ${shades})`;
}

const rowOf = (pixel) => Math.floor(pixel / width);
const columnOf = (pixel) => pixel % width;
const distance = (i, j) => Math.hypot(rowOf(i) - rowOf(j), columnOf(i) - columnOf(j));
const farthest = Math.hypot(height - 1, width - 1);
const binWidth = Math.max(1, Math.ceil((farthest + 1e-9) / BINS));
const bins = Math.floor(farthest / binWidth) + 1;
const binOf = (i, j) => Math.floor(distance(i, j) / binWidth);

const largest = (numbers) => numbers.reduce((a, b) => Math.max(a, b), -Infinity);
const smallest = (numbers) => numbers.reduce((a, b) => Math.min(a, b), Infinity);
const whole = (x) => x.toLocaleString("en");
const rounded = (x) => (x === 0 ? "0" : x >= 100 ? whole(Math.round(x)) : Number(x.toPrecision(2)).toString());
const plural = (count, one, many) => `${whole(count)} ${count === 1 ? one : many}`;

function canvasOf(id, side) {
  const canvas = typeof id === "string" ? element(id) : document.createElement("canvas");
  canvas.width = width * side;
  canvas.height = height * side;
  return canvas;
}

/** Return the picture on two canvases: dark and grey, so that colours stand out on it, and as it is. */
async function loadPictures() {
  const [dark, asItIs] = [canvasOf(null, cell), canvasOf(null, cell)];
  const source = element("picture-data").textContent.trim();
  const context = asItIs.getContext("2d");
  if (source) {
    const image = new Image();
    image.src = source;
    await image.decode();
    context.drawImage(image, 0, 0, asItIs.width, asItIs.height);
  } else {
    context.fillStyle = "#808080";
    context.fillRect(0, 0, asItIs.width, asItIs.height);
  }
  const pixels = context.getImageData(0, 0, asItIs.width, asItIs.height);
  const data = pixels.data;
  for (let at = 0; at < data.length; at += 4) {
    const grey = 0.2126 * data[at] + 0.7152 * data[at + 1] + 0.0722 * data[at + 2];
    data[at] = data[at + 1] = data[at + 2] = 14 + 0.36 * grey;
  }
  dark.getContext("2d").putImageData(pixels, 0, 0);
  return { dark, asItIs };
}

/** Return a map of colours, one [r, g, b] or null for each pixel, as a canvas of one pixel each. */
function mapOf(colours) {
  const map = canvasOf(null, 1);
  const pixels = new ImageData(width, height);
  colours.forEach((rgb, i) => rgb && pixels.data.set([...rgb, 255], 4 * i));
  map.getContext("2d").putImageData(pixels, 0, 0);
  return map;
}

/** Draw such a map over what a canvas shows. */
function paint(context, map) {
  context.imageSmoothingEnabled = false;
  context.drawImage(map, 0, 0, context.canvas.width, context.canvas.height);
}

/** Mark the pixel: a white frame within a black one is seen on every ground. */
function mark(context) {
  const side = context.canvas.width / width;
  const [x, y] = [columnOf(state.pixel) * side, rowOf(state.pixel) * side];
  const line = Math.max(2, context.canvas.width / 320);
  for (const [style, out] of [["black", 2 * line], ["white", line]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.strokeRect(x - out + line / 2, y - out + line / 2, side + 2 * out - line, side + 2 * out - line);
  }
}

/** Return what all pixels have at the levels shown, and its map. */
function survey() {
  const { alpha, beta } = state;
  const key = `${alpha} ${beta}`;
  if (!surveys.has(key)) {
    // The distance of two pixels depends on how many rows and columns they are apart: look it up.
    const table = Uint8Array.from({ length: height * width }, (_, at) => binOf(0, at));
    const [rows, columns] = [rowOf, columnOf].map((of) => Uint16Array.from({ length: height * width }, (_, i) => of(i)));
    const look = (i, j) => table[Math.abs(rows[i] - rows[j]) * width + Math.abs(columns[i] - columns[j])];
    const found = surveyOf(header, graph, state, look, bins);
    const [least, most] = [smallest(found.counts), largest(found.counts)];
    const map = mapOf(Array.from(found.counts, (count) => colour((count - least) / (most - least || 1))));
    surveys.set(key, { ...found, least, most, map });
  }
  return surveys.get(key);
}

function drawPicture() {
  const context = element("picture").getContext("2d");
  const { pixels, weights } = state.survivors;
  const plain = element("plain").checked;
  context.drawImage(plain ? pictures.asItIs : pictures.dark, 0, 0);
  const most = largest(weights), least = smallest(weights);
  if (!plain) {
    const colours = new Array(height * width).fill(null);
    const range = Math.log(most / least);
    pixels.forEach((j, k) => {
      const t = range > 0 ? Math.log(weights[k] / least) / range : 1;
      colours[j] = colour(LOWEST + (1 - LOWEST) * t);
    });
    paint(context, mapOf(colours));
  }
  mark(context);
  const ticks = !weights.length ? [] : most > least ? [least, Math.sqrt(most * least), most] : [most];
  element("weight-ticks").replaceChildren(...ticks.map(tick));
  element("weight-ramp").style.background = most > least ? ramp(LOWEST) : `rgb(${colour(1)})`;
}

function tick(number) {
  const span = document.createElement("span");
  span.textContent = rounded(number);
  return span;
}

function drawCounts() {
  const { counts, least, most, map } = survey();
  const context = element("counts").getContext("2d");
  paint(context, map);
  mark(context);
  element("count-ticks").replaceChildren(...[...new Set([least, Math.round((least + most) / 2), most])].map(tick));
  const sum = counts.reduce((a, b) => a + b, 0);
  element("counts-says").textContent =
    `${rounded(sum / counts.length)} on average, ${rounded((100 * sum) / counts.length ** 2)} % of all pairs; ` +
    `from ${whole(least)} to ${whole(most)}.`;
}

/** Draw how far away the survivors are: bars of the pixel, a line of all. */
function drawDistances() {
  const { pixels } = state.survivors;
  const own = new Array(bins).fill(0);
  for (const j of pixels) own[binOf(state.pixel, j)]++;
  const mean = Array.from(survey().distances, (count) => count / (height * width));
  const top = Math.max(...own, ...mean, 1);
  const [left, right, bottom, high] = [44, 384, 140, 128];
  const x = (bin) => left + ((right - left) * bin) / bins;
  const y = (count) => bottom - (high * count) / top;
  const parts = [];
  for (const count of [0, top / 2, top]) {
    parts.push(`<line class="axis" x1="${left}" x2="${right}" y1="${y(count)}" y2="${y(count)}"/>`);
    parts.push(`<text x="${left - 6}" y="${y(count) + 4}" text-anchor="end">${rounded(count)}</text>`);
  }
  own.forEach((count, bin) => {
    const wide = x(1) - x(0) - 2;
    parts.push(`<rect class="bar" x="${x(bin) + 1}" width="${wide}" y="${y(count)}" height="${bottom - y(count)}"/>`);
  });
  const steps = mean.map((count, bin) => `${x(bin)},${y(count)} ${x(bin + 1)},${y(count)}`);
  parts.push(`<polyline class="line" points="${steps.join(" ")}"/>`);
  const every = Math.ceil(bins / 8);
  for (let bin = 0; bin <= bins; bin += every) {
    parts.push(`<text x="${x(bin)}" y="${bottom + 18}" text-anchor="middle">${bin * binWidth}</text>`);
  }
  element("distances").innerHTML = parts.join("");
  const listed = own.map((count, bin) => `${bin * binWidth} to ${(bin + 1) * binWidth}: ${whole(count)}`);
  element("distances-says").textContent = `Survivors of the marked pixel by distance: ${listed.join(", ")}.`;
}

/** Say in words what is shown; a screen reader hears it once the pixel has come to rest. */
let speaking = 0;
function say() {
  const { pixels, weights } = state.survivors;
  let text = `Row ${rowOf(state.pixel)}, column ${columnOf(state.pixel)}: `;
  if (!pixels.length) {
    text += `none of ${whole(height * width)} pixels survives.`;
  } else {
    const most = largest(weights);
    const j = pixels[weights.indexOf(most)];
    const away = pixels.map((other) => distance(state.pixel, other)).sort((a, b) => a - b);
    text +=
      `attends to ${whole(pixels.length)} of ${plural(height * width, "pixel", "pixels")}, half of them within ` +
      `${rounded(away[Math.floor((away.length - 1) / 2)])} pixels. `;
    text += header.weighted
      ? `The largest weight, ${rounded(most)}, is that of ` +
        (j === state.pixel ? "the pixel itself." : `row ${rowOf(j)}, column ${columnOf(j)}.`)
      : `Each has the weight ${rounded(most)}.`;
  }
  element("says").textContent = text;
  clearTimeout(speaking);
  speaking = setTimeout(() => (element("spoken").textContent = text), 400);
}

function showPixel() {
  state.survivors = survivorsOf(header, graph, state.pixel, state);
  drawPicture();
  drawDistances();
  say();
}

function showAll() {
  for (const name of ["alpha", "beta"]) {
    if (!header.alpha.length) continue;
    const slider = element(name);
    state[name] = Number(slider.value);
    const shown = name === "alpha" ? header.alpha[state.alpha] : ["off", ...header.beta][state.beta];
    element(`${name}-value`).textContent = shown;
    slider.setAttribute("aria-valuetext", `${name} ${shown}`);
  }
  showPixel();
  drawCounts();
}

function move(pixel) {
  if (pixel === state.pixel) return;
  state.pixel = pixel;
  showPixel();
  drawCounts();
}

function moveTo(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const place = (at, from, length, cells) => Math.min(Math.max(Math.floor(((at - from) / length) * cells), 0), cells - 1);
  const row = place(event.clientY, box.top, box.height, height);
  move(row * width + place(event.clientX, box.left, box.width, width));
}

function moveByKey(event) {
  let [row, column] = [rowOf(state.pixel), columnOf(state.pixel)];
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key in ARROWS) {
    const by = event.shiftKey ? FAR : 1;
    row = Math.min(Math.max(row + by * ARROWS[event.key][0], 0), height - 1);
    column = Math.min(Math.max(column + by * ARROWS[event.key][1], 0), width - 1);
  } else if (event.key === "Home") {
    column = 0;
  } else if (event.key === "End") {
    column = width - 1;
  } else {
    return;
  }
  event.preventDefault(); // do not scroll
  move(row * width + column);
}

function prepareSliders() {
  const stops = { alpha: header.alpha, beta: header.beta.length ? ["off", ...header.beta] : [] };
  for (const [name, labels] of Object.entries(stops)) {
    const slider = element(name);
    for (const id of [name, `${name}-stops`, `${name}-hint`]) element(id).hidden = !labels.length;
    document.querySelector(`label[for="${name}"]`).hidden = !labels.length;
    slider.max = Math.max(labels.length - 1, 0);
    slider.value = 0;
    slider.disabled = labels.length < 2;
    element(`${name}-stops`).replaceChildren(
      ...labels.map((label) => Object.assign(document.createElement("span"), { textContent: label })),
    );
    slider.addEventListener("input", showAll);
  }
  const middle = header.alpha.indexOf("2");
  element("alpha").value = Math.max(middle, 0);
  const [rows, columns] = header.window;
  element("beta-hint").textContent =
    `also keeps, in the ${rows} x ${columns} window around it, what weighs more than beta times the window's mean`;
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser cannot inflate data (no DecompressionStream): take one of 2023 or later");
  }
  graph = decode(header, await inflate(element("data").textContent));
  pictures = await loadPictures();
  canvasOf("picture", cell);
  canvasOf("counts", Math.max(1, Math.round(cell / 2)));
  document.documentElement.style.setProperty("--shape", width / height);
  element("count-ramp").style.background = ramp(0);
  element("weights-title").textContent = header.weighted ? "weight, log scale" : "weight";
  element("plain").parentElement.hidden = !element("picture-data").textContent.trim();
  prepareSliders();
  for (const id of ["picture", "counts"]) {
    element(id).addEventListener("pointermove", moveTo);
    element(id).addEventListener("pointerdown", moveTo);
  }
  element("picture").addEventListener("keydown", moveByKey);
  element("plain").addEventListener("change", drawPicture);
  element("sliders").addEventListener("submit", (event) => event.preventDefault());
  const weighted =
    (header.alpha.length ? "Weights are the softmax over the survivors" : "The weights of a row add up to 1") +
    (header.weighted ? `, rounded by at most ${rounded(100 * header.step)} %.` : ".");
  element("footer").textContent =
    `${height} x ${width} pixels; ${plural(header.pairs, "pair survives", "pairs survive")} at some level. ` +
    `${weighted} Written by asa_ops.`;
  showAll();
  globalThis.explore.ready = true;
}

start().catch((error) => {
  element("problem").hidden = false;
  element("problem").textContent = `This page cannot be shown: ${error.message}.`;
  throw error;
});
