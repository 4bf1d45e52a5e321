"use strict";
// Earlier searches of this tab.

const EARLIER_KEY = "hashray-earlier";
const EARLIER = 12;
const earlier = () => JSON.parse(sessionStorage.getItem(EARLIER_KEY) ?? "[]");

/** The image of this tab that has a code: the file itself, or what a reload has left of it. */
function pictureOf(index, code) {
  const kept = pictures.get(`${index}:${code}`);
  if (kept) return { url: kept.url, name: kept.file.name };
  const entry = earlier().find((other) => other.thumb && other.index === index && other.code === code);
  return entry ? { url: entry.thumb, name: entry.name } : null;
}

async function keepEarlier(ask, code, file) {
  const entry = { id: ask.id, code, index: ask.index, address: location.search };
  entry.thumb = file ? await thumbOf(file).catch(() => null) : pictureOf(ask.index, code)?.url.replace(/^blob:.*/, "");
  entry.name = ask.id ?? file?.name ?? pictureOf(ask.index, code)?.name ?? "a code";
  const others = earlier().filter((other) => other.id !== entry.id || (!entry.id && other.code !== code));
  sessionStorage.setItem(EARLIER_KEY, JSON.stringify([entry, ...others].slice(0, EARLIER)));
}

function drawEarlier() {
  const entries = earlier();
  if (!entries.length) return null;
  return h("section", { "aria-label": "Earlier searches" },
    h("p", { cls: "lead" }, "Earlier in this tab"),
    h("ul", { cls: "grid strip" }, entries.map(({ id, code, index, name, address }) => {
      const kept = pictureOf(index, code);
      return h("li", {}, h("a", { cls: "picture", href: address, "data-view": "search", title: name, "aria-label": `Search by ${name} again` },
        id ? picture(id, { code, size: 128 }) : kept ? ownPicture(kept, code) : h("span", { cls: "box" }, codePicture(code))));
    })));
}
