"use strict";
// What every part of the page uses: elements, and requests to the server with their waiting and their errors.

const $ = (id) => document.getElementById(id);

/** An element: properties, then children (text, elements, null for none). */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name === "cls" ? "class" : name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const number = (value) => value.toLocaleString("en");
const plural = (count, one, many) => `${number(count)} ${count === 1 ? one : many}`;

/** Say a line to screen readers. */
function announce(text) {
  $("live").textContent = "";
  requestAnimationFrame(() => { $("live").textContent = text; });
}

class ServerError extends Error {
  constructor(status, text, requestId) {
    super(text);
    this.status = status;
    this.requestId = requestId;
  }
}

const CANCELLED = -1;
const TITLES = {
  [CANCELLED]: "No answer yet",
  0: "The server does not answer",
  400: "This search cannot be done",
  401: "A token is needed",
  404: "Not there",
  413: "The image is too large",
  415: "Not an image that the server can read",
  422: "This search cannot be done",
  429: "The server is busy",
  503: "The server cannot answer yet",
  504: "The search took too long",
};

const TOKEN_KEY = "hashray-token";
const BUSY_TRIES = 6;
let token = sessionStorage.getItem(TOKEN_KEY);
let asking = null;

/** Ask for the token; all requests that wait for it share one dialog. */
function askToken(refused) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("token-dialog");
    $("token-why").textContent = refused
      ? "The server refused that token. Check it and try again."
      : "It stays in this tab and is forgotten when the tab closes.";
    dialog.classList.toggle("refused", refused);
    const close = () => {
      asking = null;
      dialog.close();
      $("token-form").onsubmit = $("token-cancel").onclick = dialog.oncancel = null;
    };
    $("token-form").onsubmit = (event) => {
      event.preventDefault();
      token = $("token").value.trim();
      sessionStorage.setItem(TOKEN_KEY, token);
      $("token").value = "";
      close();
      resolve();
    };
    $("token-cancel").onclick = dialog.oncancel = (event) => {
      event.preventDefault();
      close();
      reject(new ServerError(401, "Without its token this service answers nothing."));
    };
    dialog.showModal();
  });
  return asking;
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("cancelled", "AbortError"));
    });
  });
}

async function problem(response) {
  const body = await response.json().catch(() => ({}));
  const text = body.error ?? body.why ?? `The server answered ${response.status} ${response.statusText}`;
  return new ServerError(response.status, text, body.request_id ?? response.headers.get("X-Request-ID"));
}

/**
 * The response of the server. It asks for the token, and waits where the server is busy or not ready.
 * After `mostTries` it does not wait again; where it is `quiet` it does not ask for the token. `waiting` is called with {kind: "busy" | "not-ready", text, seconds, tries} before each wait.
 */
async function request(path, { waiting = () => {}, mostTries = Infinity, quiet = false, signal, headers = {}, ...rest } = {}) {
  for (let tries = 1; ; tries += 1) {
    const sent = token;
    const all = sent ? { ...headers, Authorization: `Bearer ${sent}` } : headers;
    let response;
    try {
      response = await fetch(path, { ...rest, headers: all, signal, cache: rest.cache ?? "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, "Check that hashray serve runs and that this device reaches it.");
    }
    if (response.ok) return response;
    if (response.status === 401 && !quiet) {
      if (sent === token) await askToken(Boolean(sent));
      continue;
    }
    const error = await problem(response);
    const seconds = Number(response.headers.get("Retry-After")) || 1;
    if (response.status === 429 && tries < BUSY_TRIES) waiting({ kind: "busy", text: error.message, seconds, tries });
    else if (response.status === 503 && tries < mostTries) waiting({ kind: "not-ready", text: error.message, seconds, tries });
    else throw error;
    await pause(seconds, signal);
    waiting({ kind: "again", seconds: 0, tries });
  }
}

const requestJson = async (path, options) => (await request(path, options)).json();

/** The box of an error: what, why, what to do. */
function errorBox(error, retry) {
  const title = TITLES[error.status] ?? "The server failed";
  return h("div", { cls: "message error", role: "alert" },
    h("h3", {}, title),
    h("p", {}, error.message),
    h("div", { cls: "buttons" }, retry ? h("button", { type: "button", onclick: retry }, "Try again") : null),
    error.requestId ? h("p", { cls: "hint" }, "Request ", h("code", {}, error.requestId)) : null);
}
