// The page: what its form says, the pictures on their way, and the gallery of this tab.

import * as code from "./code.js";
import * as service from "./service.js";
import { ServiceError } from "./service.js";

const MOST_STREAMS = 4; // at once; browsers open six connections to a server, and cancelling needs one
const MOST_SEED = 2 ** 53 - 16; // what counts exactly here, with room to count up
const POLL_MS = 500;
const PATIENCE_MS = 5000; // that a cancelled stream gets to end by itself
const MOST_KEPT = 200; // pictures in the gallery
const SAME_FOR_ALL = [400, 401, 403, 404, 413, 415]; // statuses that say what is wrong with every picture of a request
const SMALL = 256; // pixels; pictures with fewer are shown with square pixels

const $ = (id) => document.getElementById(id);
const form = $("form");
const state = { model: "", native: [1024, 1024], image: null, thumb: "", run: null, kept: [], shown: null, code: null, refused: false };

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const say = (text) => ($("status").textContent = text);
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const nap = (ms) => new Promise((done) => setTimeout(done, ms));

// what the form says

class FieldError extends Error {
  constructor(id, message) {
    super(message);
    this.id = id;
  }
}

function number(id, whole) {
  const input = $(id);
  const text = input.value.trim();
  if (text === "" && !input.validity.badInput) return null;
  const value = Number(text);
  if (text === "" || (whole ? !Number.isInteger(value) : !Number.isFinite(value))) {
    throw new FieldError(id, `This must be a ${whole ? "whole " : ""}number.`);
  }
  return value;
}

function settings() {
  const values = Object.fromEntries(new FormData(form));
  const own = values.quality === "own";
  const steps = own ? number("steps", true) : null;
  if (own && steps === null) throw new FieldError("steps", "Give the number of steps.");
  let size = values.size;
  if (size === "own") {
    const sides = [number("width", true), number("height", true)];
    if (sides.includes(null)) throw new FieldError("width", "Give the width and the height in pixels.");
    size = sides.join("x");
  }
  if (values.method === "picture" && !state.image) throw new FieldError("image", "Choose a picture first.");
  const seed = number("seed", true);
  if (seed !== null && !(seed >= 0 && seed <= MOST_SEED)) {
    throw new FieldError("seed", `This must be from 0 to ${MOST_SEED}, or empty for a random one.`);
  }
  return {
    prompt: values.prompt,
    negative: values.negative.trim(),
    method: values.method,
    style: values.style ?? "",
    reference: values.reference,
    fidelity: values.fidelity,
    image: state.image,
    size,
    quality: own ? "auto" : values.quality,
    steps,
    count: Number(values.count),
    seed,
    guidance: number("guidance", false),
    compare: values.method !== "none" && $("compare").checked,
  };
}

function fill(from) {
  for (const name of ["prompt", "negative"]) $(name).value = from[name];
  for (const name of ["seed", "guidance"]) $(name).value = from[name] ?? "";
  form.elements.method.value = from.method;
  if (from.style) $("style").value = from.style;
  $("reference").value = from.reference;
  $("fidelity").value = from.fidelity;
  $("count").value = from.count;
  $("compare").checked = from.compare;
  const offered = [...$("size").options].some((option) => option.value === from.size);
  $("size").value = offered ? from.size : "own";
  if (!offered) [$("width").value, $("height").value] = from.size.split("x");
  $("quality").value = from.steps === null ? from.quality : "own";
  if (from.steps !== null) $("steps").value = from.steps;
  if (from.image) take(from.image);
  arrange();
}

// shows the fields that go with the others' values
function arrange() {
  const method = form.elements.method.value;
  for (const part of form.querySelectorAll("[data-method]")) part.hidden = part.dataset.method !== method;
  $("compare-row").hidden = method === "none";
  $("own-size").hidden = $("size").value !== "own";
  $("own-steps").hidden = $("quality").value !== "own";
  $("own-row").hidden = $("own-size").hidden && $("own-steps").hidden;
}

function take(image) {
  clearError("image");
  if (!image.type.startsWith("image/")) {
    showError("image", `${image.name || "This"} is not a picture; choose a PNG, JPEG or WebP file.`);
    return;
  }
  state.image = image;
  URL.revokeObjectURL(state.thumb);
  state.thumb = URL.createObjectURL(image);
  Object.assign($("thumb"), { src: state.thumb, hidden: false, alt: `Reference picture ${image.name}` });
  $("dropped").replaceChildren(element("b", { textContent: image.name || "Pasted picture" }), element("br"), "Choose another");
}

function useAsReference(files) {
  const image = [...files].find((file) => file.type.startsWith("image/")) ?? files[0];
  if (!image) return;
  form.elements.method.value = "picture";
  arrange();
  take(image);
  if (state.image === image) say("The picture is the style reference now.");
}

// errors

const FIELDS = {
  prompt: "prompt", negative_prompt: "negative", model: "style", style: "style", size: "size", quality: "quality",
  steps: "steps", seed: "seed", guidance: "guidance", n: "count", image: "image", "image[]": "image", method: "reference",
  input_fidelity: "fidelity",
};
const OF_CODES = { invalid_prompt: "prompt", invalid_image: "image", missing_image: "image" };

// the field of this page that an error is about. The engine's own errors begin with the name of the field
function fieldOf(error) {
  const named = error.param?.replace(/^stylefast\./, "") ?? error.message.match(/^(\w+) is /)?.[1];
  let id = FIELDS[named] ?? OF_CODES[error.code];
  if (id === "size" && $("size").value === "own") id = "width";
  return id && $(id).closest("[hidden]") === null ? id : null;
}

const markedBy = (id) => (id === "image" ? $("drop") : $(id));

function showError(id, message) {
  clearError(id);
  const field = $(id);
  const text = element("p", { id: `${id}-error`, className: "error", role: "alert", textContent: message });
  field.closest(".field").append(text);
  field.setAttribute("aria-describedby", text.id);
  field.setAttribute("aria-invalid", "true");
  markedBy(id).setAttribute("aria-invalid", "true");
}

function clearError(id) {
  $(`${id}-error`)?.remove();
  for (const part of [$(id), markedBy(id)]) {
    part.removeAttribute("aria-invalid");
    part.removeAttribute("aria-describedby");
  }
}

function clearErrors() {
  for (const text of [...form.querySelectorAll(".error")]) clearError(text.id.replace(/-error$/, ""));
  $("alert").hidden = true;
}

function showFailure(error) {
  if (error instanceof FieldError) {
    showError(error.id, error.message);
    $(error.id).focus();
    return;
  }
  const id = error instanceof ServiceError ? fieldOf(error) : null;
  if (id) {
    showError(id, sentence(error.message));
    $(id).focus();
    return;
  }
  const later = error.retryAfter ? ` You may try again in ${plural(error.retryAfter, "second")}.` : "";
  $("alert").textContent = sentence(error.message) + later;
  $("alert").hidden = false;
  $("alert").scrollIntoView({ block: "nearest" });
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");

// drawing

function tile(ratio) {
  const word = element("span", { className: "word", textContent: "Waiting" });
  const bar = element("progress", { max: 1, value: 0 });
  bar.setAttribute("aria-label", "Progress");
  const button = element("button", { type: "button", className: "tile" }, word, bar);
  button.setAttribute("aria-disabled", "true");
  button.style.setProperty("--ratio", ratio);
  return { button, word, bar, image: null, url: "" };
}

function put(to, blob, alt, preview) {
  const before = to.url;
  to.url = URL.createObjectURL(blob);
  if (!to.image) {
    to.image = element("img");
    to.image.addEventListener("load", () => to.image.classList.toggle("small", to.image.naturalWidth < SMALL));
    to.button.prepend(to.image);
    to.word.hidden = true;
  }
  Object.assign(to.image, { src: to.url, alt });
  to.image.classList.toggle("preview", preview);
  if (before) setTimeout(() => URL.revokeObjectURL(before), 1000);
}

function bytes(base64) {
  const text = atob(base64);
  return new Blob([Uint8Array.from(text, (letter) => letter.charCodeAt(0))], { type: "image/png" });
}

function styleName(job) {
  if (job.plain || job.settings.method === "none") return "no style";
  if (job.settings.method === "registered") return job.settings.style;
  return job.settings.reference === "instant" ? "your picture, InstantStyle" : "your picture, StyleAligned";
}

const altOf = (job) => `${job.settings.prompt}, ${styleName(job)}, seed ${job.seed}`;

function newId() {
  const numbers = crypto.getRandomValues(new Uint8Array(12));
  return `playground-${[...numbers].map((one) => one.toString(16).padStart(2, "0")).join("")}`;
}

function shots(asked) {
  const first = asked.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const [width, height] = asked.size === "auto" ? state.native : asked.size.split("x").map(Number);
  const ratio = width > 0 && height > 0 ? Math.min(Math.max(width / height, 0.2), 5) : 1;
  const jobs = [];
  const figures = [];
  for (let i = 0; i < asked.count; i++) {
    const sides = element("div", { className: "sides" });
    for (const plain of asked.compare ? [false, true] : [false]) {
      const job = { settings: asked, seed: first + i, plain, id: newId(), state: "waiting", tile: tile(ratio), step: 0, steps: 0 };
      job.time = element("span");
      const name = `Seed ${job.seed}${asked.compare ? (plain ? ", without" : ", with style") : ""}`;
      const caption = element("figcaption", {}, element("span", { textContent: name }), job.time);
      sides.append(element("figure", {}, job.tile.button, caption));
      jobs.push(job);
    }
    figures.push(element("div", { className: "shot" }, sides));
  }
  return [jobs, figures];
}

async function draw() {
  if (state.run) return;
  clearErrors();
  let asked;
  try {
    asked = settings();
    if (state.refused) await connect(); // asks for the key once more
    if (!state.model) throw new ServiceError({ message: "The model is not ready yet; try again in a moment." });
  } catch (error) {
    showFailure(error);
    return;
  }
  const [jobs, figures] = shots(asked);
  const run = { jobs, cancelled: false };
  const place = $("pictures");
  const before = { children: [...place.childNodes], count: place.dataset.count ?? "", name: place.className };
  state.run = run;
  place.replaceChildren(...figures);
  place.dataset.count = figures.length;
  place.classList.toggle("compared", asked.compare);
  busy(true);
  say(`Drawing ${plural(jobs.length, "picture")}.`);
  if (matchMedia("(max-width: 640px)").matches) place.scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth", block: "start" });

  const waiting = [...jobs];
  const worker = async () => {
    while (waiting.length) await drawOne(run, waiting.shift());
  };
  poll(run);
  await Promise.all(Array.from({ length: MOST_STREAMS }, worker));
  state.run = null;
  busy(false);

  const done = jobs.filter((job) => job.state === "done").length;
  const failed = jobs.find((job) => job.error);
  if (!done && before.children.length) {
    place.replaceChildren(...before.children); // what was there is better than nothing
    place.dataset.count = before.count;
    place.className = before.name;
  }
  $("progress").textContent = run.cancelled ? "Cancelled" : "";
  if (run.cancelled) say(done ? `Cancelled; ${plural(done, "picture")} done.` : "Cancelled.");
  else say(`${plural(done, "picture")} of ${jobs.length} done.`);
  if (failed) showFailure(failed.error);
}

async function drawOne(run, job) {
  if (run.cancelled || job.skipped) {
    ended(job, "cancelled", "Cancelled");
    return;
  }
  job.state = "running";
  job.abort = new AbortController();
  const began = performance.now();
  try {
    const request = service.fieldsOf(job.settings, state.model, { seed: job.seed, plain: job.plain });
    let previews = 0;
    for await (const event of service.drawn(request, job.id, job.abort.signal)) {
      const blob = bytes(event.b64_json);
      if (event.type.endsWith(".partial_image")) {
        previews += 1;
        put(job.tile, blob, `Preview of ${altOf(job)}`, true);
        advance(job, Math.max(job.tile.bar.value, previews / 4));
      } else {
        job.seconds = (performance.now() - began) / 1000;
        job.size = event.size;
        job.warnings = event.stylefast?.warnings ?? [];
        put(job.tile, blob, altOf(job), false);
        ended(job, "done", "");
        keep(job, blob);
      }
    }
  } catch (error) {
    if (run.cancelled || error.name === "AbortError" || error.code === "request_cancelled") {
      ended(job, "cancelled", "Cancelled");
      return;
    }
    job.error = error;
    ended(job, "failed", "Not drawn");
    if (SAME_FOR_ALL.includes(error.status)) for (const other of run.jobs) other.skipped = true;
  }
}

function advance(job, share) {
  job.tile.bar.value = share;
  const { jobs } = state.run ?? { jobs: [] };
  const done = jobs.filter((one) => one.state === "done").length;
  const ahead = jobs.filter((one) => one.state === "running").sort((a, b) => b.step - a.step)[0];
  const step = ahead?.steps ? `step ${ahead.step} of ${ahead.steps}` : "";
  $("progress").textContent = [jobs.length > 1 ? `${done} of ${jobs.length}` : "", step].filter(Boolean).join(" · ");
}

function ended(job, how, word) {
  const { button, bar, word: text } = job.tile;
  job.state = how;
  bar.remove();
  if (how === "done") {
    job.time.textContent = `${job.seconds.toFixed(1)} s`;
    button.removeAttribute("aria-disabled");
    button.setAttribute("aria-label", `Show ${altOf(job)}`);
    button.addEventListener("click", () => showDetail(job));
    if (state.run) advance(job, 1);
    return;
  }
  button.classList.toggle("failed", how === "failed");
  text.textContent = word;
  text.hidden = Boolean(job.tile.image) && how === "cancelled";
  if (how === "cancelled") job.time.textContent = word;
}

// asks how far each picture is, one after the other
async function poll(run) {
  while (state.run === run) {
    await nap(POLL_MS);
    for (const job of run.jobs.filter((one) => one.state === "running")) {
      let found;
      try {
        found = await service.progressOf(job.id);
      } catch {
        continue; // not there yet, or just gone; its stream says why
      }
      if (job.state !== "running" || state.run !== run) continue;
      [job.step, job.steps] = [found.step, found.steps];
      job.tile.word.textContent = found.status === "queued" ? "Waiting in the queue" : `Step ${found.step} of ${found.steps}`;
      advance(job, Math.max(job.tile.bar.value, found.progress));
    }
  }
}

function cancel(run) {
  if (!run || run.cancelled) return;
  run.cancelled = true;
  $("progress").textContent = "Cancelling …";
  for (const job of run.jobs.filter((one) => one.state === "running")) {
    service.cancel(job.id).catch(() => job.abort.abort()); // it may not have arrived yet
    setTimeout(() => job.state === "running" && job.abort.abort(), PATIENCE_MS);
  }
}

function busy(is) {
  $("cancel").hidden = !is;
  $("draw").setAttribute("aria-disabled", String(is));
  if (!is && document.activeElement === document.body) $("draw").focus({ preventScroll: true });
}

// gallery

function keep(job, blob) {
  job.blob = blob;
  const small = element("img", { src: job.tile.url, alt: "", loading: "lazy" });
  small.addEventListener("load", () => small.classList.toggle("small", small.naturalWidth < SMALL));
  const button = element("button", { type: "button" }, small);
  button.setAttribute("aria-label", `Show ${altOf(job)}`);
  button.addEventListener("click", () => showDetail(job));
  job.item = element("li", {}, button);
  $("gallery").prepend(job.item);
  $("gallery-section").hidden = false;
  state.kept.push(job);
  while (state.kept.length > MOST_KEPT) {
    const old = state.kept.shift();
    old.item.remove();
    if (!old.tile.button.isConnected) URL.revokeObjectURL(old.tile.url);
  }
}

// the settings of one picture, as the form would have them
function settingsOf(job) {
  return { ...job.settings, seed: job.seed, count: 1, compare: false, method: job.plain ? "none" : job.settings.method };
}

function showDetail(job) {
  state.shown = job;
  const { settings: asked } = job;
  const facts = [
    ["Style", styleName(job)],
    ["Strength", !job.plain && asked.method === "picture" ? { low: "soft", "": "medium", high: "full" }[asked.fidelity] : ""],
    ["Negative prompt", asked.negative],
    ["Seed", String(job.seed)],
    ["Size", (job.size ?? asked.size).replace("x", " × ")],
    asked.steps === null ? ["Quality", asked.quality] : ["Steps", String(asked.steps)],
    ["Guidance", asked.guidance === null ? "" : String(asked.guidance)],
    ["Time", `${job.seconds.toFixed(1)} s`],
  ].filter(([, text]) => text);
  $("detail-title").textContent = asked.prompt;
  $("detail-facts").replaceChildren(
    ...facts.flatMap(([name, text]) => [element("dt", { textContent: name }), element("dd", { textContent: text })]),
  );
  Object.assign($("detail-image"), { src: job.tile.url, alt: altOf(job) });
  $("detail-image").classList.toggle("small", (job.tile.image?.naturalWidth ?? SMALL) < SMALL);
  Object.assign($("detail-notes"), { textContent: job.warnings.join(" "), hidden: !job.warnings.length });
  const words = asked.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40);
  Object.assign($("detail-save"), { href: job.tile.url, download: `${words || "picture"}-${job.seed}.png` });
  $("detail").showModal();
}

// code

function showCode(from) {
  state.code = from;
  const request = service.fieldsOf(from, state.model, { n: from.count });
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  const language = document.querySelector("[name=language]:checked").value;
  const withKey = Boolean(service.key.get());
  $("code-text").textContent = code[language](request, base, withKey);
  $("code-copied").textContent = "";
  const notes = [
    withKey ? "The key is taken from OPENAI_API_KEY." : "",
    request.image ? `The reference picture lies beside it as ${code.fileName(request.image)}.` : "",
    language === "curl" ? "The pictures in the reply are base64." : "",
  ];
  $("code-note").textContent = notes.filter(Boolean).join(" ");
  if (!$("code").open) $("code").showModal();
}

async function copyCode() {
  let copied = false;
  try {
    await navigator.clipboard.writeText($("code-text").textContent);
    copied = true;
  } catch {
    // not a secure page, or not allowed: copy what is marked, as Ctrl+C would
    getSelection().selectAllChildren($("code-text"));
    copied = document.execCommand("copy");
  }
  $("code-copied").textContent = copied ? "Copied" : "Marked; press Ctrl+C";
}

// the key

function askKey(wrong) {
  const dialog = $("key");
  $("key-text").value = "";
  Object.assign($("key-error"), { textContent: wrong ? sentence(wrong) : "", hidden: !wrong });
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((answer) => {
    dialog.addEventListener("close", () => answer(dialog.returnValue === "given" ? $("key-text").value.trim() : null), {
      once: true,
    });
  });
}

function giveKey(event) {
  event.preventDefault();
  if (/^[\x21-\x7e]+$/.test($("key-text").value.trim())) {
    $("key").close("given");
    return;
  }
  Object.assign($("key-error"), { textContent: "Type the key; it has letters, digits and signs, but no spaces.", hidden: false });
}

// the model

function offerSizes() {
  const [width, height] = state.native;
  const unit = Math.min(width, height) >= 512 ? 64 : 8;
  const options = [4 / 3, 16 / 9, 3 / 4, 9 / 16].map((ratio) => {
    const sides = [Math.sqrt(width * height * ratio), Math.sqrt((width * height) / ratio)];
    const [w, h] = sides.map((side) => Math.max(Math.round(side / unit), 1) * unit);
    return element("option", { value: `${w}x${h}`, textContent: `${w} × ${h}` });
  });
  const own = $("size").querySelector("[value=own]");
  const auto = element("option", { value: "auto", textContent: "Auto", title: `${width} × ${height}` });
  $("size").replaceChildren(auto, ...options, own);
  [$("width").value, $("height").value] = state.native;
}

function learn(found) {
  const [model, ...styled] = found;
  state.model = model.id;
  state.native = model.stylefast.size.split("x").map(Number);
  const styles = styled.map((one) => one.stylefast.style);
  $("style").replaceChildren(...styles.map((name) => element("option", { value: name, textContent: name })));
  form.querySelector("[value=registered]").disabled = !styles.length;
  for (const option of [...$("reference").options]) if (!model.stylefast.methods.includes(option.value)) option.remove();
  offerSizes();
  arrange();
  showModel("ready", model.id);
}

function showModel(how, text) {
  $("model").dataset.state = how;
  $("model").textContent = text;
}

async function connect() {
  state.refused = false;
  for (;;) {
    try {
      learn(await service.models());
      return;
    } catch (error) {
      if (error.status === 401) {
        showModel("failed", "No key");
        state.refused = true;
        return;
      }
      const loading = error.code === "starting";
      showModel(loading ? "waiting" : "failed", loading ? "The model is being loaded …" : error.message);
      await nap(1000 * Math.min(error.retryAfter || 3, 10));
    }
  }
}

// events

form.addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
form.addEventListener("change", arrange);
form.addEventListener("input", (event) => {
  const id = event.target.id === "height" ? "width" : event.target.id; // one error for both
  if (id) clearError(id);
});
$("image").addEventListener("change", () => useAsReference($("image").files));
$("cancel").addEventListener("click", () => cancel(state.run));
$("show-code").addEventListener("click", () => {
  clearErrors();
  try {
    showCode(settings());
  } catch (error) {
    showFailure(error);
  }
});
document.addEventListener("keydown", (event) => {
  // what a keyboard composes, as of Chinese, uses both keys for itself
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") cancel(state.run);
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    draw();
  }
});

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.remove("dragging");
  useAsReference(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.some((file) => file.type.startsWith("image/"))) return;
  // office programs put a picture of the text beside it
  if (event.target.matches?.("textarea, input") && event.clipboardData.types.includes("text/plain")) return;
  event.preventDefault();
  useAsReference(files);
});

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    const box = dialog.getBoundingClientRect();
    const inside = event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
    const outside = event.target === dialog && !inside && dialog.id !== "key";
    if (outside || event.target.closest("[data-close]")) dialog.close();
  });
}
$("detail-use").addEventListener("click", () => {
  fill(settingsOf(state.shown));
  $("detail").close();
  $("prompt").focus();
});
$("detail-code").addEventListener("click", () => showCode(settingsOf(state.shown)));
for (const radio of document.querySelectorAll("[name=language]")) {
  radio.addEventListener("change", () => showCode(state.code));
}
$("code-copy").addEventListener("click", copyCode);
$("key-form").addEventListener("submit", giveKey);
service.askKeyWith(askKey);
arrange();
connect();
