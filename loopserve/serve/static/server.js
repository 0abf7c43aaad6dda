
// The API of the server that this page came from.

const KEY = "loopserve.key";

class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const server = {
  get key() {
    return sessionStorage.getItem(KEY);
  },
  set key(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  },

  async request(path, options = {}) {
    const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}) };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, "The server cannot be reached. Is it still running?");
    }
    if (!response.ok) throw new ServerError(response.status, await said(response));
    return response;
  },

  async json(path, method = "GET") {
    return (await this.request(path, { method })).json();
  },

  // Calls ``receive`` with every chunk of a streamed answer.
  async stream(body, signal, receive) {
    const response = await this.request("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError(0, "The answer ended before it was complete.");
      held += decoder.decode(value, { stream: true });
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const data = event.slice(6);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(500, chunk.error.message);
        receive(chunk);
      }
    }
  },
};

async function said(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}
