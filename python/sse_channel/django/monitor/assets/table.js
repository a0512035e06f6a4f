/**
 * The rows of a table, kept where they are from one time to the next, so that a selection and the
 * place that was scrolled to stay.
 *
 * `columns`: a function for each, in order, that gives the text of a row's cell, or puts something
 * into it (`put(row, cell)` without a result). A cell has the classes of its column's heading.
 */
export class Table {
  #body;
  #headings;
  #columns;
  #mark;

  constructor(table, columns, mark = () => "") {
    this.#body = table.tBodies[0];
    this.#headings = [...table.tHead.rows[0].cells];
    this.#columns = columns;
    this.#mark = mark;
  }

  show(rows) {
    while (this.#body.rows.length > rows.length) this.#body.deleteRow(-1);
    for (const [index, row] of rows.entries()) {
      const line = this.#body.rows[index] ?? this.#addRow();
      set(line.dataset, "mark", this.#mark(row));
      for (const [place, column] of this.#columns.entries()) {
        const cell = line.cells[place];
        const text = column(row, cell);
        if (text !== undefined) write(cell, text);
      }
    }
  }

  #addRow() {
    const line = this.#body.insertRow();
    for (const [place, { className }] of this.#headings.entries()) {
      const cell = document.createElement(place === 0 ? "th" : "td");
      if (place === 0) cell.scope = "row";
      cell.className = className;
      line.append(cell);
    }
    return line;
  }
}

/** Write only what has changed: it is cheaper, and what is selected stays so. */
export function write(element, text) {
  set(element, "textContent", text);
}

export function set(target, name, value) {
  if (target[name] !== value) target[name] = value;
}
