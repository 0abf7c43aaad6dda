
// What the policies did for one answer, beside dense attention.

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const bytes = (count) => {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (count >= 1024 && unit < 3) (count /= 1024), (unit += 1);
  return `${count.toFixed(unit && count < 100 ? 1 : 0)} ${units[unit]}`;
};
const time = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(2)} s`);
const known = (value) => typeof value === "number";
const LIVE_ROWS = 48; // while an answer is written; then the server's rows of the whole answer
let strips = 0;

// A strip of the conversation's parts, coloured by the share of their pairs that was attended; below it one row per step.
class Strip {
  constructor() {
    strips += 1;
    this.id = `strip-${strips}`;
    this.buckets = [];
    this.rows = [];
    this.current = -1;
    this.cells = element("div", {
      class: "strip", role: "listbox", tabindex: "0", "aria-label": "Attended parts of the conversation, oldest first",
    });
    this.turns = element("div", { class: "turns", "aria-hidden": "true" });
    this.steps = element("canvas", { class: "steps", "aria-hidden": "true" });
    this.readout = element("p", { class: "readout" }, "Point at a part, or use the arrow keys, to see what it is.");
    this.node = element("div", { class: "heat", hidden: true }, element("h4", {}, "Attended parts (first step on top)"),
      this.cells, this.turns, this.steps, this.readout);
    this.cells.addEventListener("keydown", (event) => this.move(event));
    for (const node of [this.cells, this.steps]) {
      node.addEventListener("pointermove", (event) => {
        const box = node.getBoundingClientRect();
        this.show(Math.floor(((event.clientX - box.left) / box.width) * this.buckets.length));
      });
    }
  }

  set(buckets) {
    this.buckets = buckets;
    this.sums = buckets.map(() => 0);
    this.counts = buckets.map(() => 0);
    this.cells.replaceChildren(...buckets.map((bucket, index) => element("div", {
      role: "option", id: `${this.id}-${index}`, "aria-selected": "false", class: index && bucket.turn !== buckets[index - 1].turn ? "begins" : "",
    })));
    const counts = new Map();
    for (const bucket of buckets.slice(0, -1)) counts.set(bucket.turn, (counts.get(bucket.turn) ?? 0) + 1);
    this.turns.replaceChildren(...[...counts].map(([turn, count]) => {
      const label = element("span", {}, count * 64 > buckets.length * 8 ? `turn ${turn + 1}` : `${turn + 1}`);
      label.style.flex = `${count} 0 0`;
      return label;
    }));
    const own = element("span", {}, "");
    own.style.flex = "1 0 0";
    this.turns.append(own);
    this.node.hidden = false;
  }

  // Adds a step. The share of a part is the mean of the steps so far.
  add(row) {
    this.rows.push(row);
    if (this.rows.length > LIVE_ROWS) this.rows.shift();
    row.forEach((share, index) => {
      if (!known(share)) return;
      this.sums[index] += share;
      this.counts[index] += 1;
    });
  }

  draw() {
    if (this.rows.length) this.paint(this.sums.map((sum, index) => (this.counts[index] ? sum / this.counts[index] : null)));
  }

  setMap(map) {
    this.set(map.buckets);
    this.rows = map.rows;
    this.paint(map.percent);
    this.show(this.current < 0 ? -1 : this.current);
  }

  paint(shares) {
    this.shares = shares;
    [...this.cells.children].forEach((cell, index) => {
      cell.style.setProperty("--share", shares[index] ?? 0);
      cell.classList.toggle("empty", !known(shares[index]));
      cell.setAttribute("aria-label", this.describe(index));
    });
    const { steps, rows, buckets } = this;
    steps.width = buckets.length;
    steps.height = rows.length;
    const pen = steps.getContext("2d");
    pen.fillStyle = "#e8640c"; // drawn over the back of either colour scheme
    rows.forEach((row, y) => row.forEach((share, x) => {
      pen.globalAlpha = (share ?? 0) / 100;
      pen.fillRect(x, y, 1, 1);
    }));
  }

  describe(index) {
    const bucket = this.buckets[index];
    const share = known(this.shares?.[index]) ? `${this.shares[index].toFixed(0)} % of its pairs attended` : "nothing yet";
    if (bucket.end === null) return `This answer: ${share}.`;
    return `Turn ${bucket.turn + 1}, tokens ${bucket.start} to ${bucket.end - 1}: ${share}.${bucket.text ? ` “${bucket.text}”` : ""}`;
  }

  show(index) {
    if (!(index >= 0 && index < this.buckets.length)) return;
    this.cells.children[this.current]?.setAttribute("aria-selected", "false");
    this.current = index;
    const cell = this.cells.children[index];
    cell.setAttribute("aria-selected", "true");
    this.cells.setAttribute("aria-activedescendant", cell.id);
    this.readout.textContent = this.describe(index);
  }

  move(event) {
    const last = this.buckets.length - 1;
    const to = { ArrowRight: Math.min(last, this.current + 1), ArrowLeft: Math.max(0, this.current - 1), Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.show(to);
  }
}

// The panel beside an answer; ``update`` fills it once the answer is complete. It begins closed where it stands below the answer.
class Panel {
  constructor(stack) {
    this.title = element("summary", {}, `Stack ${stack}`);
    this.list = element("dl");
    this.strip = new Strip();
    const open = !matchMedia("(max-width: 60rem)").matches;
    this.node = element("section", { class: "panel", "aria-label": "What the policies did" },
      element("details", { open }, this.title, this.strip.node, this.list));
  }

  // figures: those of a stored turn.
  update(figures) {
    if (figures.stack) this.title.textContent = `Stack ${figures.stack}`;
    this.list.replaceChildren();
    const share = (name, value, text = "") => {
      if (!known(value)) return;
      const fill = element("div", { class: "fill" });
      fill.style.width = `${Math.min(100, 100 * value)}%`;
      this.list.append(element("dt", {}, name), element("dd", {}, `${text}${percent(value)}`),
        element("div", { class: "track", role: "img", "aria-label": `${name}: ${percent(value)} of dense` }, fill));
    };
    const plain = (name, text) => this.list.append(element("dt", {}, name), element("dd", {}, text));
    plain("", "of dense");
    share("Prefill density", figures.prefill_tile_density);
    const fraction = figures.attended_fraction;
    if (known(fraction) && known(figures.attended_pairs) && fraction > 0) {
      const pairs = Math.round(figures.attended_pairs);
      share("Pairs read", fraction, `${pairs} / ${Math.round(figures.attended_pairs / fraction)}, `);
    }
    if (known(figures.kv_bytes_per_token) && figures.dense_kv_bytes_per_token) {
      share("KV per token", figures.kv_bytes_per_token / figures.dense_kv_bytes_per_token, `${bytes(figures.kv_bytes_per_token)}, `);
    }
    if (known(figures.ttft_ms)) plain("First token", time(figures.ttft_ms));
    if (known(figures.tpot_ms)) plain("Per token", time(figures.tpot_ms));
    if (known(figures.reused_tokens)) plain("Tokens", `${figures.reused_tokens} reused, ${figures.prompt_tokens} new`);
    if (figures.fallbacks || figures.faults) plain("Fallbacks", `${(figures.fallbacks ?? 0) + (figures.faults ?? 0)}`);
    if (figures.attention_map?.steps) this.strip.setMap(figures.attention_map);
  }
}
