// Sentences to vectors with an artifact of qcompile, in onnxruntime-web.
import { Tokenizer } from "./lib/tokenizers.min.mjs";
import * as ort from "./lib/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("lib/", import.meta.url).href;

const GRAPH = "model.onnx";
const WEIGHTS = "model.onnx.data";

/** A model of sentences: tokenizer, graph, mean over the tokens, length 1. */
export class Embedder {
  /** @param {string} folder URL of an artifact: a folder with qcompile.json. */
  static async load(folder) {
    const record = await read(`${folder}/qcompile.json`);
    const tokenizer = new Tokenizer(
      await read(`${folder}/tokenizer.json`),
      await read(`${folder}/tokenizer_config.json`),
    );
    const apart = WEIGHTS in record.sha256;
    const session = await ort.InferenceSession.create(`${folder}/${GRAPH}`, {
      externalData: apart ? [{ path: WEIGHTS, data: `${folder}/${WEIGHTS}` }] : [],
    });
    return new Embedder(tokenizer, session, record.max_length);
  }

  constructor(tokenizer, session, longest) {
    this.tokenizer = tokenizer;
    this.session = session;
    const { shape } = session.inputMetadata.find(({ name }) => name === "input_ids");
    /** Tokens that the graph takes, where it was compiled for one length only. */
    this.fixed = typeof shape[1] === "number" ? shape[1] : undefined;
    this.longest = this.fixed ?? longest ?? Infinity;
  }

  /**
   * @param {string} text
   * @returns {Promise<Float32Array>} of length 1
   */
  async embed(text) {
    const ids = this.#tokens(text);
    const length = this.fixed ?? ids.length;
    const inputs = {
      input_ids: ids,
      attention_mask: ids.map(() => 1),
      token_type_ids: [],
    };
    const feed = {};
    for (const name of this.session.inputNames) {
      const data = new BigInt64Array(length);
      inputs[name].forEach((value, at) => (data[at] = BigInt(value)));
      feed[name] = new ort.Tensor("int64", data, [1, length]);
    }
    const outputs = await this.session.run(feed);
    const { data, dims } = outputs.last_hidden_state;
    return normalized(mean(data, ids.length, dims[2]));
  }

  /** Token ids; of a text that is too long the beginning, and the token that ends it. */
  #tokens(text) {
    const { ids } = this.tokenizer.encode(text);
    return ids.length > this.longest ? [...ids.slice(0, this.longest - 1), ids.at(-1)] : ids;
  }
}

/** Cosine of the angle between two vectors of length 1. */
export function cosine(one, other) {
  return one.reduce((sum, value, at) => sum + value * other[at], 0);
}

async function read(url) {
  const response = await fetch(url);
  if (!response.ok) {
    throw new Error(`${url}: ${response.status} ${response.statusText}`);
  }
  return response.json();
}

/** Mean of the first `rows` rows of a matrix of `columns` columns, row after row. */
function mean(data, rows, columns) {
  const sums = new Float32Array(columns);
  for (let at = 0; at < rows * columns; at += 1) {
    sums[at % columns] += data[at] / rows;
  }
  return sums;
}

function normalized(vector) {
  const length = Math.hypot(...vector);
  return vector.map((value) => value / length);
}
