export class LatticeView {
  constructor(section) {
    this.section = section;
  }

  show() {
    this.section.replaceChildren();
  }
}
