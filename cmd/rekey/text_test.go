package main

import (
	"os/exec"
	"testing"
)

// What is offered for pasting is one word to a shell, whatever it holds.
func TestShellQuoted(t *testing.T) {
	for _, s := range []string{"", "plain", "key $(echo x) `id`", "it's", `a\b "c"`, "two\nlines", "$HOME"} {
		out, err := exec.Command("sh", "-c", "printf %s "+shellQuoted(s)).Output()
		if err != nil || string(out) != s {
			t.Errorf("%q comes out as %q, %v", s, out, err)
		}
	}
}

func TestPrintable(t *testing.T) {
	if got := printable("a\n2026 forged\x1b[31m\u009bé"); got != "a 2026 forged [31m é" {
		t.Errorf("%q", got)
	}
}
