package credential

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The README's state diagram is the plan table's own.
func TestReadmeHoldsTheDiagram(t *testing.T) {
	const path, begin, end = "../../README.md", "<!-- states: begin -->\n", "<!-- states: end -->"
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(b), begin)
	held, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no section between %q and %q", path, begin, end)
	}
	want := "```mermaid\n" + Diagram() + "```\n"
	if *update {
		if err := os.WriteFile(path, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, held); diff != "" {
		t.Errorf("README.md's diagram is not the plan table's; run go test ./internal/credential -update:\n%s", diff)
	}
}
