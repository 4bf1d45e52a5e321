"use strict";
// What starts the page: its events, its views, the versions that the server answers from.

const POLL_S = 5;
let knowsDuplicates = null;
let lastSearch = "?";
let misses = 0;

// ---- versions -----------------------------------------------------------------------------------------------------

/** Take what the server says of itself. */
function takeVersion(answer) {
  const before = new Map(indexes.map(({ name, version }) => [name, version]));
  indexes = answer.indexes;
  withImages = answer.images;
  Object.assign(limits, answer.limits);
  knowsDuplicates = answer.duplicates;
  document.querySelector("nav [data-view=duplicates]").hidden = !answer.duplicates;
  const main = indexes[0];
  const text = `version ${main.version} · ${plural(main.rows, "row", "rows")} · ${main.num_bits} bits`;
  if ($("served").textContent !== text) $("served").textContent = text;
  $("served").classList.remove("away");
  const changed = indexes.filter(({ name, version }) => before.has(name) && before.get(name) !== version);
  if (before.size && !changed.length) return;
  $("k").max = limits.k;
  $("within").max = Math.max(...indexes.map(({ num_bits: bits }) => bits));
  const names = Object.entries(main.attributes ?? {}).map(([name, type]) => `${name} (${type})`);
  $("where-hint").textContent = names.length ? `Attributes: ${names.join(", ")}` : "Rows of this index have no attributes to filter by.";
  const form = { ...DEFAULTS, ...readForm() };
  placeOptions($("place"), placeOf(before.size ? form : readAddress()), null);
  placeOptions($("against"), before.size ? form.against : readAddress().against, "nothing");
  for (const index of changed) sayVersion(index);
}

function sayVersion({ name, version, rows }) {
  const text = `Version ${version}${name === "main" ? "" : ` of ${name}`} is now served`;
  const again = shown && !shown.ask.version && shown.ask.index === name;
  $("toast").replaceChildren(
    h("p", {}, h("b", {}, text), ` ${plural(rows, "row", "rows")}. ${again ? "The next search uses it." : ""}`),
    ...(again ? [h("button", { type: "button", onclick: searchAgain }, "Search again")] : []),
    h("button", { type: "button", cls: "quiet", onclick: () => { $("toast").hidden = true; } }, "Dismiss"));
  $("toast").hidden = false;
  announce(`${text}. The next search uses it.`);
}

let polling = false;
async function poll() {
  if (polling || document.visibilityState !== "visible") return;
  polling = true;
  try {
    takeVersion(await requestJson("version", { quiet: true, waiting: ({ kind }) => { if (kind === "not-ready") sayAway("The server is not ready"); } }));
    misses = 0;
  } catch (error) {
    misses += 1;
    if (misses > 1) sayAway(TITLES[error.status] ?? "The server failed");
  }
  polling = false;
}

function sayAway(text) {
  $("served").textContent = text;
  $("served").classList.add("away");
}

/** Begin: wait for the server, then show what the address says. */
async function start() {
  $("state").replaceChildren();
  try {
    takeVersion(await requestJson("version", { waiting: showWaiting }));
  } catch (error) {
    fail(error, start);
    return;
  }
  $("state").replaceChildren();
  $("note").textContent = "";
  setInterval(poll, POLL_S * 1000);
  route(history.state?.y ?? 0);
}

// ---- views --------------------------------------------------------------------------------------------------------

/** Show the view that the address names; whether it is that of the duplicates. */
function showView() {
  const duplicates = new URLSearchParams(location.search).get("view") === "duplicates";
  $("search-view").hidden = duplicates;
  $("duplicates-view").hidden = !duplicates;
  for (const link of document.querySelectorAll("nav a")) {
    if ((link.dataset.view === "duplicates") === duplicates) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.querySelector(".skip").href = duplicates ? "#duplicates-title" : "#results-title";
  return duplicates;
}

/** Show what the address says. `y`: where the page stood when it was left. */
function route(y = 0) {
  const duplicates = showView();
  if (duplicates) {
    controller?.abort(); // an answer that comes now would change the address
    busy(false);
    openDuplicates();
    scrollTo({ top: y, behavior: "instant" });
    return;
  }
  lastSearch = location.search || "?";
  const ask = readAddress();
  const before = remembered.get(location.search);
  controller?.abort();
  if (before) {
    lastTry = { ask: before.ask, file: null };
    fillForm(before.ask);
    show(before.ask, before.sides);
    scrollTo({ top: y, behavior: "instant" });
    startY = y;
    announce(spoken(before.sides));
  } else if (hasQuery(ask)) search(ask, { replace: true, y });
  else blank(ask);
}

/** The page before any search, with some rows to begin with. */
function blank(ask) {
  shown = lastTry = null;
  busy(false);
  drawQuery(ask, null);
  fillForm(ask);
  for (const id of ["state", "answers"]) $(id).replaceChildren();
  for (const id of ["note", "tail-note"]) $(id).textContent = "";
  $("more").hidden = true;
  $("results").classList.add("idle");
  drawStart();
}

async function drawStart() {
  $("start-rows")?.remove();
  const page = h("div", { id: "start-rows" }, drawEarlier());
  $("answers").before(page);
  const digits = Array.from(crypto.getRandomValues(new Uint8Array(indexes[0].num_bits / 8)), (value) => value.toString(16).padStart(2, "0"));
  const answer = await fetch("search", { method: "POST", body: JSON.stringify({ code: digits.join(""), k: 12 }),
    headers: { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) } })
    .then((response) => (response.ok ? response.json() : null), () => null);
  if (!answer?.hits.length || !page.isConnected) return;
  page.append(h("section", { "aria-label": "Rows to start from" },
    h("p", { cls: "lead" }, "Or start from a row of the index"),
    h("ul", { cls: "grid" }, answer.hits.map((hit) => h("li", { cls: "card" },
      h("button", { type: "button", cls: "picture", "aria-label": `Search by ${hit.id}`, onclick: () => search({ ...DEFAULTS, ...readForm(), id: hit.id }) },
        picture(hit.id, { code: hit.code })),
      h("p", { cls: "id", title: hit.id }, hit.id))))));
}

function go(address) {
  push(address);
  route();
}

// ---- images that are given ----------------------------------------------------------------------------------------

function takeFiles(files) {
  const images = [...files].filter((file) => !file.type || file.type.startsWith("image/"));
  if (!files.length) return;
  if (!$("duplicates-view").hidden) go(lastSearch);
  if (!images.length) {
    controller?.abort();
    fail(new ServerError(415, `${files[0].name} is not an image. JPEG, PNG, WebP, GIF, BMP and TIFF are read.`), null);
    return;
  }
  const base = { ...DEFAULTS, ...readForm() };
  search({ ...base, id: null, code: null }, { file: images[0] });
  if (files.length > 1) announce("Only the first image is searched.");
}

let over = 0;
const dragsFiles = (event) => event.dataTransfer?.types.includes("Files");

addEventListener("dragenter", (event) => { if (dragsFiles(event)) { over += 1; $("drop-sign").hidden = false; } });
addEventListener("dragleave", (event) => { if (dragsFiles(event)) { over -= 1; $("drop-sign").hidden = over > 0; } });
addEventListener("dragover", (event) => { if (dragsFiles(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  over = 0;
  $("drop-sign").hidden = true;
  if (!dragsFiles(event)) return;
  event.preventDefault();
  takeFiles(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  takeFiles(event.clipboardData.files);
});
for (const id of ["pick", "photograph"]) {
  $(id).addEventListener("change", () => {
    takeFiles($(id).files);
    $(id).value = "";
  });
}

// ---- everything else that is pressed ------------------------------------------------------------------------------

$("by-id").addEventListener("submit", (event) => {
  event.preventDefault();
  search({ ...DEFAULTS, ...readForm(), id: $("id-field").value });
});
$("options").addEventListener("submit", (event) => { event.preventDefault(); searchAgain(); });
$("options").addEventListener("change", () => { if (lastTry && $("options").checkValidity()) searchAgain(); });
$("cancel").addEventListener("click", () => {
  controller.abort();
  busy(false);
  $("state").replaceChildren();
  if (shown) $("note").textContent = summary(shown.sides);
  else fail(new ServerError(CANCELLED, "The search was cancelled."), () => search(lastTry.ask, { file: lastTry.file, replace: true }));
});
$("clear").addEventListener("click", () => { go(addressOf({ ...DEFAULTS, ...readForm() })); $("pick").focus(); });
$("copy-link").addEventListener("click", async () => {
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  $("copy-link").textContent = copied ? "Copied" : "The link is in the address bar";
  announce($("copy-link").textContent);
  setTimeout(() => { $("copy-link").textContent = "Copy link"; }, 2000);
});
$("more").addEventListener("click", more);
addEventListener("scroll", moreIfScrolled, { passive: true });
$("answers").addEventListener("keydown", moveInGrid);
$("kind").addEventListener("change", () => loadGroups(true));
$("duplicates-tools").addEventListener("submit", (event) => event.preventDefault());
$("tick-all").addEventListener("click", () => keepBest(groups));
$("more-groups").addEventListener("click", () => loadGroups(false));
$("export").addEventListener("click", exportIds);
$("untick").addEventListener("click", () => { ticked.clear(); tick([], false); $("tick-all").focus(); });
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-view], a[data-home]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const home = link.closest("nav") && link.dataset.view === "search" && !$("duplicates-view").hidden;
  go(home ? lastSearch : link.getAttribute("href") === "?" ? location.pathname : link.getAttribute("href"));
});
addEventListener("popstate", (event) => route(event.state?.y ?? 0));
document.addEventListener("visibilitychange", poll);

const wide = matchMedia("(min-width: 760px)");
const fit = () => { $("options-box").open = wide.matches; };
wide.addEventListener("change", fit);
fit();

history.scrollRestoration = "manual";
$("results").classList.toggle("idle", !hasQuery(readAddress()));
drawQuery(readAddress(), null);
fillForm(readAddress());
showView();
document.documentElement.classList.add("ready");
start();
