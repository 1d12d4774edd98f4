// The server's API: calls, its errors, its event streams, and the key where it wants one.

const KEY = "penstock-key";

/** An answer that is an error; `param` is the argument at fault, where the server names one. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null } = {}, waitS = null) {
    super(message || `the server answered ${status} without a reason.`);
    Object.assign(this, { status, param, code, waitS });
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const keepKey = (key) => sessionStorage.setItem(KEY, key);

/** Ask the server: the answer, or an ApiError. `body` goes as JSON, a FormData as it is. */
export async function call(path, { method = "GET", body, signal } = {}) {
  const headers = hasKey() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {};
  if (body !== undefined && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  const answer = await fetch(new URL(path, document.baseURI), { method, body, headers, signal }).catch(unreachable);
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => ({}));
  throw new ApiError(answer.status, found.error, Number(answer.headers.get("Retry-After")) || null);
}

function unreachable(error) {
  if (error.name === "AbortError") throw error;
  throw new ApiError(0, { message: "The server does not answer. Is it running?", code: "unreachable" });
}

export const get = async (path, options) => (await call(path, options)).json();

/** The server-sent events of an answer, one after the other: {name, data}. An error event is thrown. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(unreachable);
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { name: "message", data: "" };
      for (const line of block.split(/\r?\n/)) {
        if (line.startsWith("event:")) event.name = line.slice(6).trim();
        if (line.startsWith("data:")) event.data += line.slice(5).trim();
      }
      if (!event.data || event.data === "[DONE]") continue; // a comment that keeps the connection, or the end
      event.data = JSON.parse(event.data);
      if (event.name === "error") throw new ApiError(500, event.data.error);
      yield event;
    }
  }
}

/** Where a file is; nobody can guess it, so that it needs no key. */
export const urlOf = (file) => `v1/files/${file.name}`;
