package config_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rekeyhq/rekey/internal/config"
)

func TestResolve(t *testing.T) {
	const canary = "hunter2-canary"
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return "file:" + path
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("REKEY_TEST_SECRET", canary+"\n")
	t.Setenv("REKEY_TEST_EMPTY", "")
	t.Setenv("REKEY_TEST_BIG", strings.Repeat("x", config.MaxSecretSize+1))
	link := filepath.Join(dir, "link")
	if err := os.Symlink(strings.TrimPrefix(write("linked", canary, 0o600), "file:"), link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, ref, want, err string }{
		{"file", write("a", canary, 0o600), canary, ""},
		{"read-only file", write("ro", canary, 0o400), canary, ""},
		{"one newline goes", write("nl", canary+"\n\n", 0o600), canary + "\n", ""},
		{"one CRLF goes", write("crlf", canary+"\r\n", 0o600), canary, ""},
		{"a lone CR stays", write("cr", canary+"\r", 0o600), canary + "\r", ""},
		{"inner newlines stay", write("in", "a\nb", 0o600), "a\nb", ""},
		{"link", "file:" + link, canary, ""},
		{"env", "env:REKEY_TEST_SECRET", canary, ""},
		{"group may read", write("group", canary, 0o640), "", "group or others may access it (mode 0640); fix: chmod 600 " + filepath.Join(dir, "group")},
		{"all may read", write("all", canary, 0o644), "", "fix: chmod 600"},
		{"all may write", write("wall", canary, 0o602), "", "fix: chmod 600"},
		{"empty", write("empty", "", 0o600), "", "it is empty"},
		{"only a newline", write("newline", "\n", 0o600), "", "it is empty"},
		{"too big", write("big", strings.Repeat("x", config.MaxSecretSize+1), 0o600), "", "more than 65536 bytes"},
		{"absent", "file:" + filepath.Join(dir, "none"), "", "no such file or directory"},
		{"directory", "file:" + dir, "", "it is not a regular file"},
		{"pipe", "file:" + pipe, "", "it is not a regular file"},
		{"env not set", "env:REKEY_TEST_NONE", "", "the variable is not set"},
		{"env empty", "env:REKEY_TEST_EMPTY", "", "it is empty"},
		{"env too big", "env:REKEY_TEST_BIG", "", "more than 65536 bytes"},
		{"the secret itself", canary, "", "want file:/path or env:NAME"},
		{"the secret itself, with a colon", "canary:" + canary, "", "want file:/path or env:NAME"},
		{"nothing", "", "", "want file:/path or env:NAME"},
		{"no path", "file:", "", "want file:/path or env:NAME"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := config.Resolve(t.Context(), config.Reference(c.ref))
			if string(got) != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q, %v; want %q, %q", got, err, c.want, c.err)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the secret is in the error: %v", err)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := config.Resolve(ctx, "env:REKEY_TEST_SECRET"); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled context: %v", err)
	}
	// A rotated admin password is seen without a restart.
	again := write("again", "one", 0o600)
	if b, _ := config.Resolve(t.Context(), config.Reference(again)); string(b) != "one" {
		t.Errorf("%q", b)
	}
	write("again", "two", 0o600)
	if b, _ := config.Resolve(t.Context(), config.Reference(again)); string(b) != "two" {
		t.Errorf("the old one was kept: %q", b)
	}
}
