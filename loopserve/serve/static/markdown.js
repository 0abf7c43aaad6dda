
// Markdown to DOM nodes. Text enters the document as text nodes only; nothing is parsed as HTML.

const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const DEEPEST = 8; // nesting of lists, quotes and emphasis; deeper marks stay text
const FARTHEST = 4000; // characters between two marks that belong together, so that time stays linear

function element(name, options = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") node.className = value;
    else if (key === "click") node.addEventListener("click", value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function safeAddress(text) {
  try {
    return SCHEMES.has(new URL(text).protocol) ? text : null;
  } catch {
    return null;
  }
}

function renderMarkdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
}

const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_]) *(?:\1 *){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(\S.*)$/;
const TABLE = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;

function begins(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function blocks(lines, depth) {
  const out = document.createDocumentFragment();
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) out.append(withInline(element("p"), paragraph.join("\n"), 0));
    paragraph = [];
  };
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      flush();
      at += 1;
    } else if ((match = FENCE.exec(line))) {
      flush();
      const body = [];
      const closing = new RegExp(`^ {0,3}${match[1][0] === "`" ? "`" : "~"}{${match[1].length},} *$`);
      for (at += 1; at < lines.length && !closing.test(lines[at]); at += 1) body.push(lines[at]);
      at += 1;
      out.append(codeBlock(body.join("\n"), match[2].trim().split(" ")[0]));
    } else if ((match = HEADING.exec(line))) {
      flush();
      const level = Math.min(6, match[1].length + 2); // the page has h1 and h2
      out.append(withInline(element(`h${level}`), match[2].replace(/#+$/, "").trim(), 0));
      at += 1;
    } else if (RULE.test(line)) {
      flush();
      out.append(element("hr"));
      at += 1;
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      flush();
      const body = [];
      for (; at < lines.length && QUOTE.test(lines[at]); at += 1) body.push(lines[at].replace(QUOTE, ""));
      out.append(element("blockquote", {}, blocks(body, depth + 1)));
    } else if (depth < DEEPEST && ITEM.test(line)) {
      flush();
      at = list(out, lines, at, depth);
    } else if (line.includes("|") && at + 1 < lines.length && TABLE.test(lines[at + 1])) {
      flush();
      at = table(out, lines, at);
    } else {
      paragraph.push(line.trim());
      at += 1;
    }
  }
  flush();
  return out;
}

function codeBlock(text, language) {
  const head = element("div", { class: "head" }, element("span", { class: "muted" }, language || "code"));
  if (navigator.clipboard) {
    const copy = element("button", { type: "button", class: "small" }, "Copy");
    copy.addEventListener("click", () => navigator.clipboard.writeText(text).then(() => (copy.textContent = "Copied"), () => {}));
    head.append(copy);
  }
  return element("div", { class: "code" }, head, element("pre", { tabindex: "0" }, element("code", {}, text)));
}

function list(out, lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  const base = first[1].length;
  const ordered = /\d/.test(first[2]);
  const node = element(ordered ? "ol" : "ul");
  if (ordered && parseInt(first[2], 10) !== 1) node.setAttribute("start", parseInt(first[2], 10));
  let at = start;
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > base + 1 || RULE.test(lines[at]) || /\d/.test(item[2]) !== ordered) break;
    const inner = item[0].length - item[3].length;
    const body = [item[3]];
    let blank = false;
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at];
      const indent = line.length - line.trimStart().length;
      if (!line.trim()) {
        blank = true;
        body.push("");
      } else if (indent >= base + 2) {
        body.push(line.slice(Math.min(indent, inner)));
      } else if (!blank && !begins(line)) {
        body.push(line.trim());
      } else break;
    }
    const found = element("li", {}, blocks(body, depth + 1));
    for (const child of [...found.children]) if (child.tagName === "P") child.replaceWith(...child.childNodes, element("br"));
    while (found.lastChild?.tagName === "BR") found.lastChild.remove();
    for (const child of [...found.children]) {
      if (child.tagName === "BR" && ["UL", "OL", "DIV"].includes(child.nextElementSibling?.tagName)) child.remove();
    }
    node.append(found);
  }
  out.append(node);
  return at;
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((each) => each.trim());
}

function table(out, lines, start) {
  const row = (line, name) => element("tr", {}, ...cells(line).map((each) => withInline(element(name), each, 0)));
  const body = element("tbody");
  let at = start + 2;
  for (; at < lines.length && lines[at].includes("|"); at += 1) body.append(row(lines[at], "td"));
  out.append(element("div", { class: "scroll" }, element("table", {}, element("thead", {}, row(lines[start], "th")), body)));
  return at;
}

function withInline(parent, text, depth) {
  let plain = "";
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  let at = 0;
  while (at < text.length) {
    const rest = depth < DEEPEST ? mark(text, at, depth) : null;
    if (rest) {
      flush();
      parent.append(rest.node);
      at = rest.end;
    } else if (text[at] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (text[at] === "*" || text[at] === "_" || text[at] === "`") {
      for (const kind = text[at]; text[at] === kind; at += 1) plain += kind; // a run that opens nothing
    } else {
      plain += text[at];
      at += 1;
    }
  }
  flush();
  return parent;
}

// Returns the node of the mark that begins at a place, and where it ends; null if none does.
function mark(text, at, depth) {
  switch (text[at]) {
    case "\n":
      return { node: element("br"), end: at + 1 };
    case "`":
      return codeSpan(text, at);
    case "[":
      return link(text, at, depth);
    case "!":
      return text[at + 1] === "[" ? link(text, at + 1, depth) : null; // a picture is a link: the page loads nothing
    case "*":
    case "_":
      return emphasis(text, at, depth);
    case "~":
      return text.startsWith("~~", at) ? between(text, at, "~~", "del", depth) : null;
    case "h":
      return address(text, at);
    default:
      return null;
  }
}

function codeSpan(text, at) {
  const run = /^`+/.exec(text.slice(at, at + FARTHEST))[0];
  let end = at + run.length;
  const limit = Math.min(text.length, at + FARTHEST);
  while (end < limit) {
    end = text.indexOf("`", end);
    if (end < 0 || end >= limit) return null;
    let size = 0;
    while (text[end + size] === "`") size += 1;
    if (size === run.length) return { node: element("code", {}, text.slice(at + size, end).trim()), end: end + size };
    end += size;
  }
  return null;
}

function link(text, at, depth) {
  const middle = text.indexOf("](", at);
  if (middle < 0 || middle - at > FARTHEST || text.slice(at + 1, middle).includes("[")) return null;
  const end = text.indexOf(")", middle);
  if (end < 0 || end - middle > FARTHEST) return null;
  const target = safeAddress(text.slice(middle + 2, end).trim().split(/\s/)[0]);
  if (target === null) return null;
  return { node: withInline(anchor(target), text.slice(at + 1, middle), Math.max(depth + 1, DEEPEST)), end: end + 1 };
}

function anchor(target) {
  return element("a", { href: target, rel: "noopener noreferrer", target: "_blank" });
}

function address(text, at) {
  if (!text.startsWith("http://", at) && !text.startsWith("https://", at)) return null;
  if (at && /\w/.test(text[at - 1])) return null;
  const found = /^[^\s<>"'`|]*/.exec(text.slice(at, at + FARTHEST))[0].replace(/[.,;:!?*_)\]]+$/, "");
  if (safeAddress(found) === null) return null;
  const node = anchor(found);
  node.append(found);
  return { node, end: at + found.length };
}

function emphasis(text, at, depth) {
  const kind = text[at];
  if (kind === "_" && at && /\w/.test(text[at - 1])) return null; // snake_case
  const double = text[at + 1] === kind;
  return between(text, at, double ? kind + kind : kind, double ? "strong" : "em", depth);
}

function between(text, at, sign, name, depth) {
  const start = at + sign.length;
  if (!text[start] || /\s/.test(text[start])) return null;
  for (let end = text.indexOf(sign, start + 1); end >= 0 && end - at < FARTHEST; end = text.indexOf(sign, end)) {
    let run = 0;
    while (text[end + run] === sign[0]) run += 1;
    const fits = sign.length === 1 ? run !== 2 : run >= 2;
    const word = sign[0] === "_" && /\w/.test(text[end + run] ?? "");
    if (fits && !word && !/\s/.test(text[end - 1])) {
      const close = end + run - sign.length; // of a longer run the last ones
      return { node: withInline(element(name), text.slice(start, close), depth + 1), end: close + sign.length };
    }
    end += Math.max(run, 1);
  }
  return null;
}
