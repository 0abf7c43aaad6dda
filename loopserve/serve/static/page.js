
// The page: conversations on the left, the open one in the middle, one answer under way at most.

const $ = (id) => document.getElementById(id);
const state = { model: "", session: null, turns: [], writing: null };

// Colours.

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", name === "dark" ? "Light colours" : "Dark colours");
}

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const chosenTheme = () => localStorage.getItem("loopserve.theme");
setTheme(chosenTheme() ?? (systemDark.matches ? "dark" : "light"));
systemDark.addEventListener("change", (event) => {
  if (!chosenTheme()) setTheme(event.matches ? "dark" : "light");
});
$("theme").addEventListener("click", () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("loopserve.theme", name);
  setTheme(name);
});

// Messages to the user.

const say = (text) => ($("status").textContent = text);

function alertUser(error) {
  $("alert").hidden = !error;
  $("alert").textContent = error ? error.message : "";
}

// Runs work on the server; its error is shown, or asks for the key again.
async function attempt(work) {
  try {
    alertUser(null);
    return await work();
  } catch (error) {
    if (error.status === 401) askForKey(server.key ? "The server does not know this key." : "");
    else alertUser(error);
    return undefined;
  }
}

// Sign-in.

function askForKey(message) {
  server.key = null;
  $("sign-in-error").textContent = message;
  if (!$("sign-in").open) $("sign-in").showModal();
}

$("sign-in").addEventListener("cancel", (event) => event.preventDefault());
$("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  server.key = $("key").value.trim();
  $("key").value = "";
  $("sign-in").close();
  await start();
});
$("sign-out").addEventListener("click", () => {
  state.writing?.abort();
  server.key = null;
  history.replaceState(null, "", location.pathname);
  location.reload();
});

async function start() {
  const models = await attempt(() => server.json("/v1/models"));
  if (!models) return;
  const [model] = models.data;
  state.model = model.id;
  $("model").textContent = model.id;
  $("sign-out").hidden = !server.key;
  $("stack").replaceChildren(...model.loopserve.stacks.map((name) => element("option", { value: name }, name)));
  $("stack").value = model.loopserve.stack;
  await refreshList();
  if (location.hash.length > 1) await open(location.hash.slice(1));
  if ([document.body, null].includes(document.activeElement)) $("entry").focus(); // nobody is elsewhere already
}

// Conversations.

const when = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "short" });

async function refreshList() {
  const sessions = await attempt(() => server.json("/v1/sessions"));
  if (!sessions) return;
  $("no-sessions").hidden = sessions.data.length > 0;
  $("sessions").replaceChildren(...sessions.data.map((each) => {
    const turns = `${each.turns} turn${each.turns === 1 ? "" : "s"}, ${when.format(1000 * each.updated)}`;
    const button = element("button", { type: "button", "aria-current": String(each.id === state.session) },
      each.title || "(empty)", element("small", {}, turns));
    button.addEventListener("click", async () => {
      showList(false);
      await open(each.id);
    });
    return element("li", {}, button);
  }));
}

function showList(shown) {
  $("list").classList.toggle("shown", shown);
  $("show-list").setAttribute("aria-expanded", String(shown));
}

$("show-list").addEventListener("click", () => showList(!$("list").classList.contains("shown")));

function leaveAnswer() {
  state.writing?.abort();
  state.writing = null;
  setWriting(false);
}

async function open(id) {
  leaveAnswer();
  const session = await attempt(() => server.json(`/v1/sessions/${encodeURIComponent(id)}`));
  if (session) show(session);
  else show(null);
  await refreshList();
}

function show(session) {
  state.session = session?.id ?? null;
  state.turns = session?.turns ?? [];
  history.replaceState(null, "", session ? `#${session.id}` : location.pathname);
  drawTurns();
  follow();
}

// Scrolls so that the last answer's text is in view, as far as possible from its question on.
function follow() {
  const log = $("log");
  const turn = log.lastElementChild;
  const text = turn?.querySelector(".answer > div > .text");
  if (!text) return;
  const top = log.scrollTop - log.getBoundingClientRect().top;
  log.scrollTop = Math.max(top + turn.getBoundingClientRect().top - 8, top + text.getBoundingClientRect().bottom + 60 - log.clientHeight);
}

$("new").addEventListener("click", async () => {
  leaveAnswer();
  alertUser(null);
  show(null);
  showList(false);
  $("entry").focus();
  await refreshList();
});

$("undo").addEventListener("click", async () => {
  const last = state.turns.at(-1);
  const done = await attempt(async () => {
    await server.json(`/v1/sessions/${state.session}/undo`, "POST");
    return true;
  });
  if (!done) return;
  if (!$("entry").value) $("entry").value = questionOf(last);
  await open(state.session);
  say("The last turn was taken back.");
  $("entry").focus();
});

$("export").addEventListener("click", async () => {
  const session = await attempt(() => server.json(`/v1/sessions/${state.session}`));
  if (!session) return;
  const address = URL.createObjectURL(new Blob([JSON.stringify(session, null, 2)], { type: "application/json" }));
  element("a", { href: address, download: `conversation-${session.id.slice(0, 8)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
});

$("delete").addEventListener("click", () => $("confirm").showModal());
$("confirm-no").addEventListener("click", () => $("confirm").close());
$("confirm-yes").addEventListener("click", async () => {
  $("confirm").close();
  leaveAnswer();
  const done = await attempt(() => server.json(`/v1/sessions/${state.session}`, "DELETE"));
  if (!done) return;
  show(null);
  await refreshList();
  say("The conversation was deleted.");
  $("entry").focus();
});

// Turns.

const isQuestion = (message) => message.role === "user";
const questionOf = (turn) => turn.messages.filter(isQuestion).at(-1)?.content ?? "";

function drawTurns() {
  $("log").replaceChildren(...state.turns.map(drawTurn));
  setWriting(false);
}

function drawTurn(turn, index) {
  const said = turn.messages.map((message) => drawMessage(message.content, message.role, isQuestion(message) && repeatable(turn) ? () => edit(turn, index) : null));
  const text = element("div", { class: "text" }, renderMarkdown(turn.answer.content));
  const panel = new Panel(turn.figures.stack ?? "");
  panel.update(turn.figures);
  const tools = element("div", { class: "tools" });
  if (index === state.turns.length - 1 && repeatable(turn)) {
    tools.append(element("button", { type: "button", class: "small", click: () => regenerate(turn) }, "Regenerate"));
  }
  if (turn.finish_reason === "length") tools.append(element("span", { class: "note" }, "The answer reached its longest length."));
  const body = element("div", {}, ...extras(turn.answer), text, tools);
  return element("div", { class: "turn", "data-turn": turn.id }, ...said,
    element("article", { class: "answer", "aria-label": `Answer ${index + 1}` }, body, panel.node));
}

// Nodes for what an answer holds beside its text.
function extras({ reasoning_content: thought, tool_calls: calls }) {
  const found = [];
  if (thought) found.push(element("details", {}, element("summary", {}, "Reasoning"), element("div", { class: "text" }, renderMarkdown(thought))));
  if (calls) found.push(element("div", { class: "text" }, codeBlock(typeof calls === "string" ? calls : JSON.stringify(calls, null, 2), "tool calls")));
  return found;
}

function drawMessage(content, role, change) {
  const node = element("div", { class: "said" });
  if (role !== "user") node.append(element("strong", {}, role));
  else node.append(element("span", { class: "unseen" }, "You: "));
  const long = content.length > 1000; // scrolls within itself, by keyboard as well
  node.append(element("p", long ? { class: "long", tabindex: "0" } : {}, content));
  if (change) {
    node.append(element("div", { class: "row" }, element("button", { type: "button", class: "small", "aria-label": "Edit this message and branch", click: change }, "Edit")));
  }
  return node;
}

// Changes a message: the answer to the changed one begins a branch, and the conversation stays as it is.
function edit(turn, index) {
  if (state.writing) return;
  const node = $("log").querySelector(`[data-turn="${turn.id}"] .said:last-of-type`);
  const field = element("textarea", { rows: "3", "aria-label": "Changed message" });
  field.value = questionOf(turn);
  const leave = () => {
    drawTurns();
    $("log").querySelector(`[data-turn="${turn.id}"] .said button`)?.focus();
  };
  const form = element("form", { class: "said editing" }, field, element("div", { class: "row" },
    element("button", { type: "button", class: "small", click: leave }, "Cancel"),
    element("button", { type: "submit", class: "small primary" }, "Send as a branch")));
  const submit = () => {
    const text = field.value.trim();
    if (!text) return;
    const last = turn.messages.findLastIndex(isQuestion);
    const messages = turn.messages.map((message, number) => ({ role: message.role, content: number === last ? text : message.content }));
    state.turns = state.turns.slice(0, index);
    $("log").replaceChildren(...state.turns.map(drawTurn));
    answer(messages, { messages, ...after(turn.parent) });
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  field.addEventListener("keydown", (event) => {
    if (sends(event)) {
      event.preventDefault();
      submit();
    } else if (event.key === "Escape") leave();
  });
  node.replaceWith(form);
  field.focus();
}

const plainMessage = ({ role, content }) => ({ role, content });
const after = (turn) => (turn ? { previous_response_id: turn } : {});
// Whether this page can ask a turn's question again: not where tools were defined or answered.
const repeatable = (turn) => turn.messages.every((message) => ["user", "system", "developer"].includes(message.role));

function regenerate(turn) {
  if (state.writing) return;
  state.turns = state.turns.slice(0, -1);
  $("log").replaceChildren(...state.turns.map(drawTurn));
  answer(turn.messages, { messages: turn.messages.map(plainMessage), conversation: state.session, ...after(turn.parent) });
}

// Answering.

function setWriting(writing) {
  $("stop").hidden = !writing;
  $("send").hidden = writing;
  $("actions").hidden = !state.session;
  $("undo").disabled = writing || !state.turns.length;
  $("title").textContent = state.turns.length ? questionOf(state.turns[0]).trim().split("\n")[0].slice(0, 80) : "New conversation";
  for (const button of $("log").querySelectorAll(".said button, .tools button")) button.disabled = writing;
}

// Has messages answered. where: the fields of the request that say what they go on from.
async function answer(messages, where) {
  const controller = new AbortController();
  state.writing = controller;
  const panel = new Panel($("stack").value);
  const text = element("div", { class: "text" });
  const thought = element("div", { class: "text" });
  const thinking = element("details", { hidden: true }, element("summary", {}, "Reasoning"), thought);
  const body = element("div", {}, thinking, text);
  const article = element("article", { class: "answer writing", "aria-busy": "true", "aria-label": "Answer being written" }, body, panel.node);
  $("log").append(element("div", { class: "turn" }, ...messages.map((each) => drawMessage(each.content, each.role, null)), article));
  setWriting(true);
  alertUser(null);
  say("The answer is being written.");
  let written = "";
  let thoughts = "";
  let figures = null;
  let drawn = 0;
  const draw = () => {
    drawn = 0;
    const end = () => text.getBoundingClientRect().bottom - $("log").getBoundingClientRect().bottom;
    const inView = end() < 80; // who scrolls up to read is left there
    text.replaceChildren(renderMarkdown(written));
    thinking.hidden = !thoughts;
    thought.replaceChildren(renderMarkdown(thoughts));
    panel.strip.draw();
    if (inView && end() > -60) follow();
  };
  follow();
  const temperature = parseFloat($("temperature").value);
  const request = {
    model: state.model,
    stream: true,
    stream_options: { include_usage: true },
    loopserve: { stack: $("stack").value, attention_map: true },
    ...(temperature >= 0 && temperature <= 2 ? { temperature } : {}),
    ...where,
  };
  try {
    await server.stream(request, controller.signal, (chunk) => {
      const delta = chunk.choices[0]?.delta;
      written += delta?.content ?? "";
      thoughts += delta?.reasoning_content ?? "";
      const more = chunk.loopserve;
      if (more?.attention?.buckets) panel.strip.set(more.attention.buckets);
      if (more?.attention) panel.strip.add(more.attention.row);
      if (more?.session_id) figures = more;
      drawn ||= requestAnimationFrame(draw);
    });
    cancelAnimationFrame(drawn);
    if (state.writing !== controller) return;
    const session = await server.json(`/v1/sessions/${figures.session_id}`);
    if (state.writing !== controller) return;
    state.writing = null;
    const focused = document.activeElement;
    show(session);
    if (!focused?.isConnected) $("entry").focus();
    say(`The answer is complete. ${session.turns.at(-1).answer.content.slice(0, 500)}`);
  } catch (error) {
    cancelAnimationFrame(drawn);
    if (state.writing !== controller) return;
    state.writing = null;
    draw();
    article.classList.remove("writing");
    article.removeAttribute("aria-busy");
    stopped(messages, where, body, error);
  }
  await refreshList();
}

// Says that an answer is not complete: the server has taken it back, so the conversation is where it was before.
function stopped(messages, where, body, error) {
  const aborted = error.name === "AbortError";
  if (!aborted) {
    if (error.status === 401) askForKey("The server does not know this key.");
    else alertUser(error);
  }
  const retry = element("button", { type: "button", class: "small" }, "Try again");
  retry.addEventListener("click", () => {
    retry.closest(".turn").remove();
    answer(messages, where);
  });
  const back = element("button", { type: "button", class: "small" }, "Discard");
  back.addEventListener("click", async () => {
    if (!$("entry").value) $("entry").value = messages.filter(isQuestion).at(-1)?.content ?? "";
    if (state.session) await open(state.session);
    else show(null);
    $("entry").focus();
  });
  body.append(element("div", { class: "tools" },
    element("span", { class: "note" }, `${aborted ? "Stopped" : "Broken off"}: this is not part of the conversation.`), retry, back));
  setWriting(false);
  say("The answer was stopped.");
  $("entry").focus();
}

const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

async function send() {
  const content = $("entry").value.trim();
  if (!content || state.writing || !state.model) return;
  $("entry").value = "";
  const messages = [{ role: "user", content }];
  if (!state.session) {
    show(null); // removes an answer that was stopped
    await answer(messages, { messages });
    return;
  }
  // A stopped answer to an edited message leaves fewer turns here than the server has: it has the last word.
  const session = await attempt(() => server.json(`/v1/sessions/${state.session}`));
  if (!session) {
    $("entry").value = content;
    return;
  }
  show(session);
  await answer(messages, { messages, conversation: session.id, ...after(session.head) });
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("entry").addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => state.writing?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (state.writing) state.writing.abort();
  else if ($("list").classList.contains("shown")) {
    showList(false);
    $("show-list").focus();
  }
});

start();
