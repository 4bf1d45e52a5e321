"use strict";
// Pictures of rows, and codes drawn as bits.

let withImages = true; // whether the server has the pictures of its rows
const CELLS = 32; // bits a line
const KEPT = 400; // pictures that are kept when they need the token

const imagePath = (id, size) => `image/${encodeURIComponent(id)}?size=${size}`;

const bitsOf = (code) => [...code].flatMap((digit) => {
  const value = parseInt(digit, 16);
  return [8, 4, 2, 1].map((mask) => (value & mask ? 1 : 0));
});

/** The numbers of the bits in which two codes differ; bit 0 is the first of the first byte. */
function differing(code, other) {
  const bits = bitsOf(other);
  return bitsOf(code).flatMap((bit, position) => (bit === bits[position] ? [] : [position]));
}

function cells(count, marked, cls, perLine = CELLS) {
  const lines = Math.ceil(count / perLine);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${Math.min(count, perLine) * 10 - 2} ${lines * 10 - 2}`);
  svg.setAttribute("class", cls);
  svg.setAttribute("aria-hidden", "true");
  const paths = { same: "", differs: "" };
  for (let position = 0; position < count; position += 1) {
    const [x, y] = [(position % perLine) * 10, Math.floor(position / perLine) * 10];
    paths[marked(position) ? "differs" : "same"] += `M${x} ${y}h8v8h-8z`;
  }
  for (const [name, d] of Object.entries(paths)) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", name);
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

/** The bits of a row's code; those that differ from the query's are marked. */
function bitsPicture(queryCode, code) {
  const apart = new Set(differing(queryCode, code));
  return cells(code.length * 4, (position) => apart.has(position), "bits");
}

/** The code itself as a square, where there is no picture. */
function codePicture(code) {
  const bits = bitsOf(code);
  return cells(bits.length, (position) => bits[position], "print", Math.ceil(Math.sqrt(bits.length)));
}

const blobs = new Map();

/** The address of a picture as a blob: for servers that want the token, and for pictures that had to wait. */
function blobOf(id, size) {
  const path = imagePath(id, size);
  if (!blobs.has(path)) {
    blobs.set(path, request(path, { cache: "default", mostTries: BUSY_TRIES }).then((answer) => answer.blob()).then(URL.createObjectURL));
    blobs.get(path).catch(() => blobs.delete(path));
    if (blobs.size > KEPT) {
      const [oldest, url] = blobs.entries().next().value;
      blobs.delete(oldest);
      url.then(URL.revokeObjectURL, () => {});
    }
  }
  return blobs.get(path);
}

const nearView = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    nearView.unobserve(target);
    blobOf(target.dataset.id, target.dataset.size).then((url) => { target.src = url; }, () => target.dispatchEvent(new Event("error")));
  }
}, { rootMargin: "400px" });

/** The box of a row's picture. It has its size before the picture is there. */
function picture(id, { code = null, size = 256, alt = "" } = {}) {
  const box = h("span", { cls: "box" });
  const instead = () => box.replaceChildren(code ? codePicture(code) : h("span", { cls: "no-picture" }, "no picture"));
  if (!withImages) {
    instead();
    return box;
  }
  const image = h("img", { alt, decoding: "async", draggable: "false", width: size, height: size, loading: token ? null : "lazy" });
  image.addEventListener("load", () => image.classList.add("there"));
  let again = Boolean(token);
  image.addEventListener("error", () => {
    if (again) return instead();
    again = true; // a busy server refuses pictures too: ask once more, with its waiting
    return blobOf(id, size).then((url) => { image.src = url; }, instead);
  });
  if (token) {
    Object.assign(image.dataset, { id, size });
    nearView.observe(image);
  } else image.src = imagePath(id, size);
  box.append(image);
  return box;
}

/** The link to a row's original file. */
function originalLink(id) {
  if (!withImages) return null;
  return h("a", {
    href: imagePath(id, 0), target: "_blank", rel: "noopener", "aria-label": `Original of ${id}`,
    onclick: (event) => {
      if (!token) return;
      event.preventDefault();
      const tab = window.open("", "_blank");
      request(imagePath(id, 0)).then((answer) => answer.blob()).then(
        (blob) => openBlob(blob, id, tab),
        (error) => { tab?.close(); announce(`${id}: ${error.message}`); });
    },
  }, "Original");
}

/** Show a picture in a tab; anything that is none is saved, for a tab would run it here. */
function openBlob(blob, id, tab) {
  const url = URL.createObjectURL(blob);
  if (tab && /^image\/(jpeg|png|webp|gif|bmp|avif|tiff)$/.test(blob.type)) tab.location = url;
  else {
    tab?.close();
    saveAs(url, id.split("/").pop());
  }
}

function saveAs(url, name) {
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function drawn(bitmap, side) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = h("canvas", { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** A thumbnail of an image file as a data: address. */
async function thumbOf(file) {
  return drawn(await createImageBitmap(file), 160).toDataURL("image/jpeg", 0.8);
}

/** A smaller JPEG of an image file, of at most `most` bytes where that can be. */
async function shrunken(file, most) {
  const bitmap = await createImageBitmap(file);
  let blob = file;
  for (const side of [1600, 1024, 512]) {
    blob = await new Promise((resolve) => { drawn(bitmap, side).toBlob(resolve, "image/jpeg", 0.92); });
    if (blob.size <= most) break;
  }
  return blob;
}
