"use strict";
// The search: what the server is asked, and the states of its answer.

function sidesOf(ask) {
  const sides = [{ index: ask.index, version: ask.version }];
  if (ask.against) sides.push(asPlace(ask.against));
  return sides;
}

async function askServer(ask, { index, version }, file, offset, options) {
  const wanted = { k: Number(ask.k), offset, index };
  if (ask.within !== "") wanted.within = Number(ask.within);
  if (ask.where) wanted.where = ask.where;
  if (version) wanted.version = Number(version);
  if (file) {
    const send = (body) => requestJson(`search?${new URLSearchParams(wanted)}`,
      { method: "POST", body, headers: { "Content-Type": body.type || "application/octet-stream" }, ...options });
    if (file.size > limits.body_bytes) return send(await shrunken(file, limits.body_bytes));
    return send(file).catch(async (error) => {
      if (error.status !== 413 && !/\bpixels\b/.test(error.message)) throw error;
      return send(await shrunken(file, limits.body_bytes).catch(() => { throw error; }));
    });
  }
  if (ask.code && index !== ask.index && !sameModel(index, ask.index)) {
    throw new ServerError(400, otherModel(index));
  }
  const query = ask.id ? { id: ask.id } : { code: ask.code };
  return requestJson("search", { method: "POST", body: JSON.stringify({ ...query, ...wanted }), headers: { "Content-Type": "application/json" }, ...options });
}

const otherModel = (index) => `A code belongs to one model. Give the image again to search ${index} with it.`;
const sameModel = (one, other) => indexNamed(one)?.model === indexNamed(other)?.model && indexNamed(one)?.num_bits === indexNamed(other)?.num_bits;

/** The answer of each side. One of the same model takes the code of the first: the row may be new there. */
async function askSides(ask, file, source, options) {
  const [place, other] = sidesOf(ask);
  const first = await askServer(ask, place, file, 0, options);
  if (!other) return [first];
  if (!sameModel(place.index, other.index)) return [first, await askServer(ask, other, file ?? source, 0, options)];
  return [first, await askServer({ ...ask, id: null, code: first.query.code }, other, null, 0, options)];
}

/** Search: `file` or the id or code of `ask`. The address and the page follow the answer. */
async function search(ask, { file = null, replace = false, y = 0 } = {}) {
  const signal = begin(ask, file);
  if (!file) push(addressOf(ask), replace);
  try {
    const source = file ?? pictures.get(`${ask.index}:${ask.code}`)?.file;
    const answers = await askSides(ask, file, source, { signal, waiting: showWaiting });
    const sides = answers.map((answer) => ({ answer, hits: answer.hits, actions }));
    if (source) for (const { query, index } of answers) pictures.set(`${index}:${query.code}`, { file: source, url: urlOf(source) });
    if (file) {
      ask = { ...ask, id: null, code: answers[0].query.code };
      push(addressOf(ask), replace);
    }
    lastTry = { ask, file: null };
    show(ask, sides);
    scrollTo({ top: y, behavior: "instant" });
    startY = y;
    announce(spoken(sides));
    keepEarlier(ask, sides[0].answer.query.code, ask.id ? null : source);
  } catch (error) {
    if (error.name === "AbortError") return;
    fail(error, () => search(ask, { file, replace: true }));
  }
}

/** The page while an answer is awaited. */
function begin(ask, file) {
  controller?.abort();
  controller = new AbortController();
  lastTry = { ask, file };
  $("toast").hidden = true;
  $("results").classList.remove("idle");
  $("where").removeAttribute("aria-invalid");
  $("start-rows")?.remove();
  drawQuery(ask, file);
  fillForm(ask);
  $("state").replaceChildren();
  $("more").hidden = true;
  $("tail-note").textContent = "";
  if (!shown || $("answers").classList.contains("beside") !== Boolean(ask.against)) {
    keepingFocus(() => drawSkeleton(Number(ask.k), Boolean(ask.against)));
  }
  busy(true);
  return controller.signal;
}

/** Redraw the answers; a focus inside them goes to their title, not to nowhere. */
function keepingFocus(draw) {
  const inside = $("answers").contains(document.activeElement);
  draw();
  if (inside) $("results-title").focus({ preventScroll: true });
}

let clock = null;
function busy(on) {
  clearInterval(clock);
  $("results").classList.toggle("busy", on);
  $("results").setAttribute("aria-busy", String(on));
  $("bar").hidden = $("cancel").hidden = !on;
  if (!on) return;
  $("note").textContent = "Searching…";
  const start = performance.now();
  clock = setInterval(() => {
    const seconds = Math.round((performance.now() - start) / 1000);
    if (seconds === 1) announce("Still searching.");
    if (!$("state").firstChild) $("note").textContent = `Still searching, ${seconds} s so far`;
  }, 1000);
}

function showWaiting({ kind, text, seconds, tries }) {
  if (kind === "again") return;
  $("results").classList.remove("idle");
  const title = TITLES[kind === "busy" ? 429 : 503];
  const next = `Trying again in ${plural(seconds, "second", "seconds")}${tries > 1 ? ` (${plural(tries, "try", "tries")} so far)` : ""}.`;
  $("note").textContent = kind === "busy" ? "The server is busy" : "Waiting for the server";
  if (!$("state").firstChild) announce(`${title}. ${text}`);
  $("state").replaceChildren(h("div", { cls: "message wait" }, h("h3", {}, title), h("p", {}, text), h("p", { cls: "hint" }, next)));
}

function fail(error, retry) {
  busy(false);
  shown = null;
  $("results").classList.remove("idle");
  if (/^where\b/.test(error.message)) $("where").setAttribute("aria-invalid", "true");
  keepingFocus(() => $("answers").replaceChildren());
  $("answers").removeAttribute("aria-hidden");
  $("note").textContent = "";
  $("state").replaceChildren(errorBox(error, retry));
}

function summary(sides) {
  const [{ answer, hits }, other] = sides;
  if (other) {
    const ids = new Set(other.hits.map((hit) => hit.id));
    return `${number(hits.filter((hit) => ids.has(hit.id)).length)} of ${plural(hits.length, "result", "results")} in both`;
  }
  return `${number(hits.length)} of ${plural(answer.rows, "row", "rows")} · ${placeText(sides[0])} · ${answer.took_ms.toFixed(1)} ms`;
}

/** The summary for ears. */
function spoken(sides) {
  const [{ answer, hits }, other] = sides;
  if (other) return `${summary(sides)}: ${placeText(sides[0])} and ${placeText(other)}`;
  return `${plural(hits.length, "result", "results")}${answer.more ? ", more follow" : ""}. Version ${answer.version}.`;
}

/** Write an answer that is there. */
function show(ask, sides) {
  busy(false);
  shown = { ask, sides };
  remembered.delete(location.search);
  remembered.set(location.search, shown);
  if (remembered.size > REMEMBERED) remembered.delete(remembered.keys().next().value);
  drawQuery(ask, null, sides[0].answer.query.code);
  $("note").textContent = summary(sides);
  $("answers").removeAttribute("aria-hidden");
  keepingFocus(() => drawAnswers(sides));
  drawState(ask, sides);
  drawTail();
}

function drawState(ask, sides) {
  const boxes = sides.filter(({ answer }) => answer.degraded).map((side) => h("div", { cls: "message warning" },
    h("h3", {}, "This answer is not complete"),
    h("p", {}, `${plural(side.answer.missing_shards, "shard", "shards")} of ${placeText(side)} did not answer, so nearer rows may be missing.`),
    h("div", { cls: "buttons" }, h("button", { type: "button", onclick: searchAgain }, "Search again"))));
  if (sides.every(({ hits }) => hits.length === 0)) {
    const narrow = [ask.within !== "" && `within ${ask.within} bits`, ask.where && `with ${ask.where}`].filter(Boolean).join(" and ");
    boxes.push(h("div", { cls: "message" }, h("h3", {}, "No row is near enough"),
      h("p", {}, narrow ? `There is no row ${narrow}.` : "This index holds no rows."),
      narrow ? h("div", { cls: "buttons" }, h("button", { type: "button", onclick: () => search({ ...ask, within: "", where: "" }) }, "Search without radius and filter")) : null));
  }
  $("state").replaceChildren(...boxes);
}

// ---- more, without end --------------------------------------------------------------------------------------------

let startY = 0; // where the page stood when the answer was written: more is loaded once it is scrolled on
let nearTail = false;
const tailSeen = new IntersectionObserver(([entry]) => { nearTail = entry.isIntersecting; moreIfScrolled(); }, { rootMargin: "500px" });

function moreIfScrolled() {
  if (nearTail && shown && scrollY > startY && !$("more").hidden && !$("more").disabled) more();
}

function drawTail() {
  const { sides } = shown;
  const some = sides.some(({ answer }) => answer.more);
  const room = sides[0].hits.length + Number(shown.ask.k) <= limits.offset;
  $("more").hidden = !(some && room);
  $("more").disabled = false;
  $("tail-note").textContent = some && !room ? `The nearest ${number(sides[0].hits.length)} are shown. A radius or a filter narrows the search.`
    : !some && sides[0].hits.length ? "That is all." : "";
  tailSeen.disconnect();
  nearTail = false;
  if (some && room) tailSeen.observe($("more"));
}

/** The next k of each answer, of the version that is shown already. */
async function more() {
  const { ask, sides } = shown;
  const page = shown;
  const from = sides[0].hits.length;
  const focused = document.activeElement === $("more");
  $("more").disabled = true;
  $("tail-note").textContent = "Loading more…";
  try {
    const wanted = sides.filter(({ answer }) => answer.more);
    const answers = await Promise.all(wanted.map(({ answer, hits }) => askServer(
      { ...ask, id: null, code: answer.query.code, index: answer.index }, { index: answer.index, version: answer.version }, null, hits.length,
      { signal: controller.signal, waiting: ({ text }) => { if (text) $("tail-note").textContent = `${text}. Trying again…`; } })));
    if (shown !== page) return;
    wanted.forEach((side, position) => {
      side.hits = [...side.hits, ...answers[position].hits];
      const { more: rest, degraded, missing_shards: missing } = answers[position];
      const before = side.answer;
      side.answer = { ...before, more: rest, degraded: degraded || before.degraded, missing_shards: Math.max(missing, before.missing_shards) };
    });
    drawAnswers(sides, from);
    drawState(ask, sides);
    $("note").textContent = summary(sides);
    announce(`${plural(sides[0].hits.length, "result", "results")} shown`);
    drawTail();
    if (focused) $("answers").querySelectorAll(".picture")[from]?.focus({ preventScroll: true });
  } catch (error) {
    if (error.name === "AbortError" || shown !== page) return;
    tailSeen.disconnect();
    nearTail = false;
    $("more").disabled = false;
    $("tail-note").textContent = `${TITLES[error.status] ?? "The server failed"}: ${error.message}`;
    announce($("tail-note").textContent);
  }
}

const actions = {
  search: (id) => search({ ...lastTry.ask, ...readForm(), id, code: null }),
  filter: (where) => { $("where").value = where; searchAgain(); },
};
