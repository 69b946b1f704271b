// Reading the data of the page. asa_ops/explore/document.py says what is stored. Nothing here touches the document.

/** Return the bytes that a text in base64 holds, inflated. */
async function inflate(base64) {
  const packed = Uint8Array.from(atob(base64.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Return `count` numbers of 7 bits a byte, the lowest first, the highest bit set where more follow. */
function readNumbers(bytes, count) {
  const numbers = new Uint32Array(count);
  let at = 0;
  for (let i = 0; i < count; i++) {
    let byte, shift = 0;
    do {
      byte = bytes[at++];
      numbers[i] |= (byte & 127) << shift;
      shift += 7;
    } while (byte & 128);
  }
  return numbers;
}

/**
 * Return the graph of all levels: row i holds columns[k], k from offsets[i] to offsets[i + 1], ascending; bit l of
 * alpha[k] says whether that pair survives at level l of alpha, bit l of beta[k] the same of beta; its weight is
 * exp(-weight[k] * header.step) times the largest of all.
 */
function decode(header, bytes) {
  const streams = {};
  let begin = 0;
  for (const [name, length] of Object.entries(header.streams)) {
    streams[name] = bytes.subarray(begin, begin += length);
  }
  const pixels = header.grid[0] * header.grid[1];
  const counts = readNumbers(streams.counts, pixels);
  const steps = readNumbers(streams.steps, header.pairs);

  // Pass 1: how long each row is. A pair i < j stands in row i if i keeps j, and in row j if j keeps i.
  const { alpha, alpha_back, beta, beta_back, weight, weight_back, base } = streams;
  const kept = (k) => alpha[k] | beta[k];
  const keptBack = (k) => (alpha[k] ^ alpha_back[k]) | (beta[k] ^ beta_back[k]);
  const second = new Uint32Array(header.pairs);
  const offsets = new Uint32Array(pixels + 1);
  for (let i = 0, k = 0; i < pixels; i++) {
    for (let j = i, end = k + counts[i]; k < end; k++) {
      second[k] = j += steps[k];
      if (kept(k)) offsets[i + 1]++;
      if (j > i && keptBack(k)) offsets[j + 1]++;
    }
  }
  for (let i = 0; i < pixels; i++) offsets[i + 1] += offsets[i];

  // Pass 2: fill them. What comes from smaller pixels comes first, so columns ascend.
  const total = offsets[pixels];
  const graph = {
    offsets,
    columns: new Uint32Array(total),
    alpha: new Uint8Array(total),
    beta: new Uint8Array(total),
    weight: new Uint8Array(total),
  };
  const next = offsets.slice();
  const put = (row, column, ofAlpha, ofBeta, ofWeight) => {
    const at = next[row]++;
    graph.columns[at] = column;
    graph.alpha[at] = ofAlpha;
    graph.beta[at] = ofBeta;
    graph.weight[at] = ofWeight; // an array of bytes takes it modulo 256
  };
  for (let i = 0, k = 0; i < pixels; i++) {
    for (const end = k + counts[i]; k < end; k++) {
      const j = second[k];
      if (kept(k)) put(i, j, alpha[k], beta[k], weight[k]);
      if (j > i && keptBack(k)) {
        put(j, i, alpha[k] ^ alpha_back[k], beta[k] ^ beta_back[k], weight[k] + weight_back[k] + base[j] - base[i]);
      }
    }
  }
  return graph;
}

/** Return the bits of the levels shown: of alpha, and of beta, where 0 is none. */
function bitsOf(level) {
  return { alpha: 1 << level.alpha, beta: level.beta > 0 ? 1 << (level.beta - 1) : 0 };
}

/** Return the survivors of a pixel and the softmax weights over them. */
function survivorsOf(header, graph, pixel, level) {
  const bits = bitsOf(level);
  const pixels = [], weights = [];
  let sum = 0;
  for (let k = graph.offsets[pixel]; k < graph.offsets[pixel + 1]; k++) {
    if (graph.alpha[k] & bits.alpha || graph.beta[k] & bits.beta) {
      const weight = Math.exp(-graph.weight[k] * header.step);
      pixels.push(graph.columns[k]);
      weights.push(weight);
      sum += weight;
    }
  }
  return { pixels, weights: weights.map((weight) => weight / sum) };
}

/** Return how many survivors each pixel has, and how many there are in all in each bin of distances. */
function surveyOf(header, graph, level, binOf, bins) {
  const bits = bitsOf(level);
  const [height, width] = header.grid;
  const counts = new Uint32Array(height * width);
  const distances = new Float64Array(bins);
  for (let i = 0; i < counts.length; i++) {
    for (let k = graph.offsets[i]; k < graph.offsets[i + 1]; k++) {
      if (graph.alpha[k] & bits.alpha || graph.beta[k] & bits.beta) {
        counts[i]++;
        distances[binOf(i, graph.columns[k])]++;
      }
    }
  }
  return { counts, distances };
}
