// Calls of the service that this page came from: its routes, its errors, its streams, and the key that it may ask for.

const KEY = "stylefast-key";

// an error in words, with the name of the field that is at fault, where the service knows it
export class ServiceError extends Error {
  constructor({ message, param = null, code = null }, status = 0, retryAfter = 0) {
    super(message.replace(/^request \d+: /, ""));
    this.param = param;
    this.code = code;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let held = null; // the key, where the browser allows no storage

function storage() {
  try {
    return sessionStorage;
  } catch {
    return null;
  }
}

export const key = {
  get: () => storage()?.getItem(KEY) ?? held,
  set: (text) => {
    held = text;
    storage()?.setItem(KEY, text);
  },
};

let asking = null; // one question, whoever waits for its answer
let ask = async () => null;

// `question` shows a dialog and returns the key, or null; it is told what is wrong with the last one
export function askKeyWith(question) {
  ask = question;
}

function newKey(used, message) {
  if (key.get() !== used) return Promise.resolve(key.get()); // somebody gave one in the meantime
  asking ??= ask(used ? message : "").finally(() => (asking = null));
  return asking;
}

// returns the reply, or throws a ServiceError; asks for the key where one is needed
export async function call(path, options = {}) {
  for (;;) {
    const used = key.get();
    const headers = { ...options.headers, ...(used && { authorization: `Bearer ${used}` }) };
    let reply;
    try {
      reply = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError({ message: "The server can't be reached.", code: "unreachable" });
    }
    if (reply.ok) return reply;
    const error = await errorOf(reply);
    if (reply.status !== 401) throw error;
    const given = await newKey(used, error.message);
    if (given === null) throw error;
    key.set(given);
  }
}

async function errorOf(reply) {
  let found = null;
  try {
    found = (await reply.json()).error;
  } catch {
    // no JSON
  }
  // something between us and the service may have answered, in a shape of its own
  if (typeof found?.message !== "string") found = { message: `The server answered with status ${reply.status}.` };
  return new ServiceError(found, reply.status, Number(reply.headers.get("retry-after")) || 0);
}

// the fields of a request; `plain` leaves the style out
export function fieldsOf(settings, model, { seed = settings.seed, n = 1, plain = false } = {}) {
  const styled = !plain && settings.method === "registered";
  const pictured = !plain && settings.method === "picture";
  const own = {};
  if (settings.negative) own.negative_prompt = settings.negative;
  if (settings.steps !== null) own.steps = settings.steps;
  if (settings.guidance !== null) own.guidance = settings.guidance;
  if (seed !== null) own.seed = seed;
  if (pictured) own.method = settings.reference;
  const fields = { prompt: settings.prompt, model: styled ? `${model}/${settings.style}` : model };
  if (n > 1) fields.n = n;
  if (settings.size !== "auto") fields.size = settings.size;
  if (settings.quality !== "auto") fields.quality = settings.quality;
  if (pictured && settings.fidelity) fields.input_fidelity = settings.fidelity;
  if (Object.keys(own).length) fields.stylefast = own;
  return { route: pictured ? "v1/images/edits" : "v1/images/generations", fields, image: pictured ? settings.image : null };
}

// draws one picture; yields the events of its stream: previews, then the picture. Throws a ServiceError
export async function* drawn({ route, fields, image }, id, signal) {
  fields = { ...fields, stream: true, partial_images: 3 };
  const headers = { "x-request-id": id };
  let body;
  if (image) {
    body = new FormData();
    for (const [name, value] of Object.entries(fields)) {
      body.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
    }
    body.append("image", image, "reference");
  } else {
    headers["content-type"] = "application/json";
    body = JSON.stringify(fields);
  }
  const reply = await call(route, { method: "POST", headers, body, signal });
  for await (const event of events(reply.body)) {
    if (event.type === "error") throw new ServiceError(event.error);
    yield event;
    if (event.type.endsWith(".completed")) return;
  }
  throw new ServiceError({ message: "The connection ended before the picture was there; draw it again." });
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServiceError({ message: "The connection was lost while the picture was drawn; draw it again." });
      }
      if (piece.done) return;
      const parts = (rest + piece.value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) yield eventOf(data.map((line) => line.slice(5)).join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // nobody reads on, so the connection is free
  }
}

function eventOf(text) {
  try {
    const event = JSON.parse(text);
    if (typeof event.type === "string") return event;
  } catch {
    // no JSON
  }
  throw new ServiceError({ message: "The server's reply can't be read; draw it again." });
}

export const progressOf = async (id) => (await call(`v1/images/${id}`)).json();
export const cancel = (id) => call(`v1/images/${id}`, { method: "DELETE" });
export const models = async () => (await (await call("v1/models")).json()).data;
