"use strict";
// What is asked: its address, the form of the options, the query at the top.

const DEFAULTS = { id: null, code: null, k: "10", within: "", where: "", version: "", index: "main", against: "" };
const REMEMBERED = 20;
const LAST = 10000;
const limits = { k: 1000, offset: LAST, body_bytes: Infinity };
let indexes = [];
let shown = null; // {ask, sides} on the page
let lastTry = null; // {ask, file}
let controller = null;
const remembered = new Map(); // address -> {ask, sides}
const pictures = new Map(); // index:code -> {file, url} of images of this visit

// ---- addresses ----------------------------------------------------------------------------------------------------

function readAddress() {
  const parameters = new URLSearchParams(location.search);
  return Object.fromEntries(Object.entries(DEFAULTS).map(([name, value]) => [name, parameters.get(name) ?? value]));
}

function addressOf(ask) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(ask)) if (value && value !== DEFAULTS[name]) parameters.set(name, value);
  const text = parameters.toString();
  return text ? `?${text}` : location.pathname;
}

function push(address, replace = false) {
  if (replace || address === location.search) history.replaceState({ y: scrollY }, "", address);
  else {
    history.replaceState({ y: scrollY }, "");
    history.pushState({ y: 0 }, "", address);
  }
}

/** index@version as the selects write it. */
const placeOf = (ask) => `${ask.index}@${ask.version}`;
const asPlace = (text) => { const [index, version] = text.split("@"); return { index, version: version ?? "" }; };
const indexNamed = (name) => indexes.find((index) => index.name === name);
const hasQuery = (ask) => Boolean(ask.id || ask.code);

// ---- the form -----------------------------------------------------------------------------------------------------

function placeOptions(select, chosen, first) {
  const options = first ? [["", first]] : [];
  for (const { name, version, versions } of indexes) {
    options.push([`${name}@`, `${name}, newest (${version})`]);
    for (const old of [...(versions ?? [])].sort((a, b) => b - a).slice(0, 30)) options.push([`${name}@${old}`, `${name}, version ${old}`]);
  }
  if (chosen && !options.some(([value]) => value === chosen)) options.push([chosen, chosen.replace("@", ", version ")]);
  select.replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
  select.value = chosen;
}

function fillForm(ask) {
  for (const name of ["k", "within", "where"]) $(name).value = ask[name];
  placeOptions($("place"), placeOf(ask), null);
  placeOptions($("against"), ask.against, "nothing");
  const changed = [ask.within && `radius ${ask.within}`, ask.where, ask.version && `version ${ask.version}`, ask.against && "side by side"];
  $("options-summary").textContent = changed.filter(Boolean).join(" · ");
}

function readForm() {
  return { k: $("k").value, within: $("within").value, where: $("where").value.trim(), ...asPlace($("place").value), against: $("against").value };
}

/** Search again with what the form says, if there is a query. */
function searchAgain() {
  if (!$("options").reportValidity()) return;
  const base = lastTry ?? { ask: { ...DEFAULTS } };
  const ask = { ...base.ask, ...readForm() };
  if (!hasQuery(ask) && !base.file) {
    announce("Choose an image first.");
    $("pick").focus();
    return;
  }
  const moved = ask.code && ask.index !== base.ask.index;
  const file = base.file ?? (moved ? pictures.get(`${base.ask.index}:${ask.code}`)?.file : null);
  if (moved && file) ask.code = null;
  else if (moved && !sameModel(ask.index, base.ask.index)) {
    fail(new ServerError(400, otherModel(ask.index)), null);
    return;
  }
  search(ask, { file });
}

// ---- the query ----------------------------------------------------------------------------------------------------

function queryPicture(side, size = 256) {
  const { id, code } = side.answer.query;
  const own = pictureOf(side.answer.index, code);
  if (id || !own) return id ? picture(id, { code, size, alt: `Query ${id}` }) : h("span", { cls: "box" }, codePicture(code));
  return ownPicture(own, code);
}

const urls = new WeakMap();

function urlOf(file) {
  if (!urls.has(file)) urls.set(file, URL.createObjectURL(file));
  return urls.get(file);
}

function ownPicture({ url }, code) {
  const image = h("img", { src: url, alt: "Your image", cls: "there" });
  const box = h("span", { cls: "box" }, image);
  image.addEventListener("error", () => box.replaceChildren(code ? codePicture(code) : h("span", { cls: "no-picture" }, "no preview")));
  return box;
}

function drawQuery(ask, file, code = ask.code) {
  const some = Boolean(file || hasQuery(ask));
  const known = pictureOf(ask.index, ask.code);
  $("ask").classList.toggle("empty", !some);
  $("clear").hidden = $("copy-link").hidden = !some;
  $("query").replaceChildren(...(!some ? [] : [
    file ? ownPicture({ url: urlOf(file) }, null) :
    ask.id ? picture(ask.id, { code, alt: `Query ${ask.id}` }) :
    known ? ownPicture(known, ask.code) : h("span", { cls: "box" }, codePicture(ask.code))]));
  const name = file?.name ?? (ask.id || known?.name || (ask.code && `code ${ask.code}`)) ?? "";
  $("query-name").replaceChildren(...(some ? [h("b", {}, file || known ? "Your image" : ask.id ? "Row of the index" : "A code"), h("span", { title: name }, name)] : []));
  document.title = some && name ? `${name} · hashray` : "hashray";
}
