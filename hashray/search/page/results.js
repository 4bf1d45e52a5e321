"use strict";
// Cards of an answer, one answer or two side by side, and a row's details.

const CLASS_NAMES = ["class", "classes", "label", "labels"];
const SHOWN_ATTRIBUTES = 2;

const asText = (value) => (Array.isArray(value) ? value.join(", ") : value === null ? "none" : String(value));
const quoted = (text) => `'${text.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'`;
const literal = (value) => (typeof value === "string" ? quoted(value) : typeof value === "boolean" ? (value ? "True" : "False") : String(value));

function parted(attributes) {
  const entries = Object.entries(attributes ?? {}).filter(([, value]) => value !== null && value !== "");
  const main = CLASS_NAMES.map((name) => entries.find(([key]) => key === name)).find(Boolean);
  return { main, others: entries.filter((entry) => entry !== main) };
}

/** The class of a row: a button that searches again in that class only. */
function badge(entry, onFilter) {
  if (!entry) return null;
  const [name, value] = entry;
  const first = Array.isArray(value) ? value[0] : value;
  if (!/^[A-Za-z_]\w*$/.test(name) || first === undefined) return h("span", { cls: "badge" }, asText(value));
  return h("button", { type: "button", cls: "badge", title: `Only rows with ${name} ${first}`, "aria-label": `${asText(value)}: only rows with this ${name}`,
    onclick: () => onFilter(`${name} == ${literal(first)}`) }, asText(value));
}

/** What a card needs of its answer: {answer, hits, place, actions: {search, filter}}. */
function card(side, rank, other) {
  const hit = side.hits[rank];
  const { main, others } = parted(hit.attributes);
  const apart = `${number(hit.distance)} of ${side.answer.num_bits} bits differ`;
  const there = other ? other.hits.findIndex((row) => row.id === hit.id) : -1;
  return h("li", { cls: other ? (there < 0 ? "card alone" : "card shared") : "card" },
    h("button", { type: "button", cls: "picture", "aria-label": `Search by ${hit.id}, ${apart}`, title: "Search by this image",
      onclick: () => side.actions.search(hit.id) }, picture(hit.id, { code: hit.code })),
    h("div", { cls: "facts" },
      h("p", { cls: "distance", title: apart }, h("strong", {}, number(hit.distance)), ` ${hit.distance === 1 ? "bit" : "bits"}`),
      badge(main, side.actions.filter)),
    bitsPicture(side.answer.query.code, hit.code),
    h("p", { cls: "id", title: hit.id }, hit.id),
    others.length ? h("p", { cls: "attributes" }, others.slice(0, SHOWN_ATTRIBUTES).map(([name, value]) =>
      h("span", {}, `${name} `, h("b", {}, asText(value))))) : null,
    other ? h("p", { cls: "rank" }, there < 0 ? `${rank + 1}, only here` : there === rank ? `${rank + 1} in both` : `${rank + 1} here, ${there + 1} there`) : null,
    h("p", { cls: "links" },
      h("button", { type: "button", cls: "link", "aria-label": `Details of ${hit.id}`, onclick: (event) => showDetails(side, rank, event.currentTarget) }, "Details"),
      originalLink(hit.id)));
}

function column(side, other) {
  const list = h("ul", { cls: "grid" }, side.hits.map((_, rank) => card(side, rank, other)));
  if (!other) return list;
  return h("section", { cls: "column", "aria-label": placeText(side) }, h("h3", {}, placeText(side)), list);
}

const placeText = (side) => `${side.answer.index}, version ${side.answer.version}`;

/** Write the answers. With `from`, only the cards behind it are added to those of one answer. */
function drawAnswers(sides, from = 0) {
  const list = $("answers").querySelector(".grid");
  if (from && sides.length === 1 && list) {
    for (let rank = from; rank < sides[0].hits.length; rank += 1) list.append(card(sides[0], rank));
    return;
  }
  const [left, right] = sides;
  $("answers").className = right ? "beside" : "";
  $("answers").replaceChildren(column(left, right), ...(right ? [column(right, left)] : []));
}

/** Boxes in the places of the results to come. */
function drawSkeleton(count, double) {
  const list = () => h("ul", { cls: "grid" }, Array.from({ length: Math.min(count, 12) }, () =>
    h("li", { cls: "card skeleton" }, h("span", { cls: "picture" }, h("span", { cls: "box" })), h("p", {}), h("p", {}))));
  $("answers").className = double ? "beside" : "";
  $("answers").replaceChildren(...(double ? [h("section", { cls: "column" }, list()), h("section", { cls: "column" }, list())] : [list()]));
  $("answers").setAttribute("aria-hidden", "true");
}

/** The row and the query next to each other, the bits between them, all attributes. */
function showDetails(side, rank, opener) {
  const dialog = $("details");
  const hit = side.hits[rank];
  const apart = differing(side.answer.query.code, hit.code);
  const go = (step) => {
    const next = Math.min(Math.max(rank + step, 0), side.hits.length - 1);
    if (next !== rank) showDetails(side, next, opener);
  };
  const attributes = Object.entries(hit.attributes ?? {});
  dialog.replaceChildren(
    h("div", { cls: "dialog-head" },
      h("h2", { id: "details-title", tabindex: "-1" }, hit.id),
      h("button", { type: "button", cls: "quiet", onclick: () => dialog.close() }, "Close")),
    h("div", { cls: "pair" },
      h("figure", {}, queryPicture(side, 512), h("figcaption", {}, "Query")),
      h("figure", {}, picture(hit.id, { code: hit.code, size: 512, alt: hit.id }), h("figcaption", {}, `Result ${rank + 1}`))),
    bitsPicture(side.answer.query.code, hit.code),
    h("p", {}, apart.length === 0 ? "The codes are equal." : `${plural(apart.length, "bit differs", "bits differ")} of ${side.answer.num_bits}: ${apart.join(", ")}`),
    h("dl", {},
      attributes.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, asText(value))]),
      h("dt", {}, "code"), h("dd", {}, h("code", {}, hit.code)), h("dt", {}, "index"), h("dd", {}, placeText(side))),
    h("div", { cls: "buttons" },
      h("button", { type: "button", cls: "primary", onclick: () => { dialog.close(); side.actions.search(hit.id); } }, "Search by this image"),
      originalLink(hit.id),
      h("span", { cls: "steps" },
        h("button", { type: "button", "aria-label": "The result before", onclick: () => go(-1), disabled: rank === 0 }, "←"),
        h("button", { type: "button", "aria-label": "The next result", onclick: () => go(1), disabled: rank === side.hits.length - 1 }, "→"))));
  dialog.onkeydown = (event) => {
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  };
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  dialog.onclose = () => opener.isConnected && opener.focus();
  if (!dialog.open) dialog.showModal();
  $("details-title").focus();
}

/** Left and right, up and down between the pictures of a grid; Tab still goes through everything. */
function moveInGrid(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -2, ArrowDown: 2 }[event.key];
  const here = event.target.closest?.(".picture");
  if (!step || !here) return;
  const cards = [...here.closest(".grid").children];
  const columns = cards.filter((item) => item.offsetTop === cards[0].offsetTop).length;
  const target = cards.indexOf(here.closest("li")) + Math.sign(step) * (Math.abs(step) === 2 ? columns : 1);
  if (!cards[target]) return;
  event.preventDefault();
  cards[target].querySelector(".picture").focus();
}
