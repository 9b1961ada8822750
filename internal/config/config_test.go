package config_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/config"
)

func TestTemplateIsValid(t *testing.T) {
	c, err := config.Parse("/etc/rekey/rekey.yaml", config.Template(), fakeKinds())
	if err != nil {
		t.Fatal(err)
	}
	spec := c.Credentials["orders/db"]
	if spec.Every.D() != 24*time.Hour || spec.Overlap.Min.D() != time.Hour || spec.Overlap.Max.D() != 6*time.Hour {
		t.Errorf("the interval or overlap is wrong: %+v", spec)
	}
	if got, want := string(spec.Fields), `{"owner_role":"orders_owner","roles":["orders_a","orders_b"]}`; got != want {
		t.Errorf("fields %s, want %s", got, want)
	}
	if spec.StepDeadline.D() != 30*time.Second || spec.Kind != "postgres" || len(spec.Consumers) != 2 || !spec.Consumers[0].Required {
		t.Errorf("not filled in: %+v", spec)
	}
	target := decoded[fakeTarget](c.Targets[0].Fields)
	if target.Admin.Password != "file:/etc/rekey/orders-db-admin.password" || c.Targets[0].Concurrency != 4 {
		t.Errorf("the target is not filled in, or its reference not absolute: %+v", c.Targets[0])
	}
	if store := decoded[fakeStore](c.Stores["default"].Fields); store.Dir != "/etc/rekey/secrets" || store.Identity != "file:/etc/rekey/identity.txt" {
		t.Errorf("the store's paths are not absolute: %+v", store)
	}
	if c.Server.DataDir != "/etc/rekey/data" || c.Server.Listen != "unix:/etc/rekey/data/api.sock" || c.NATS.Port != 4222 {
		t.Errorf("server and nats: %+v %+v", c.Server, c.NATS)
	}
	if got := c.Slots["orders/db"]; len(got) != 2 {
		t.Errorf("slots %v", got)
	}
	if _, err := json.Marshal(c); err != nil {
		t.Error(err)
	}
}

// Every commented-out line of the template has to be valid too.
func TestTemplateUncommented(t *testing.T) {
	lines := strings.Split(string(config.Template()), "\n")
	for i, l := range lines[8:] {
		trimmed := strings.TrimLeft(l, " ")
		rest, ok := strings.CutPrefix(trimmed, "# ")
		key, _, _ := strings.Cut(strings.TrimLeft(rest, " "), ":")
		if ok && strings.Contains(rest, ":") && key != "" && strings.Trim(key, "abcdefghijklmnopqrstuvwxyz_") == "" {
			lines[8+i] = l[:len(l)-len(trimmed)] + rest
		}
	}
	text := strings.Join(lines, "\n")
	if !strings.Contains(text, "\n    adopt:") || !strings.Contains(text, "\nnats:") {
		t.Fatalf("nothing was uncommented:\n%s", text)
	}
	if _, err := config.Parse("rekey.yaml", []byte(text), fakeKinds()); err != nil {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestDefaults(t *testing.T) {
	for _, c := range []struct {
		every    string
		defaults string
		min, max time.Duration
	}{
		{"30d", "", time.Hour, 24 * time.Hour},
		{"2h", "", 30 * time.Minute, time.Hour},
		{"0s", "", time.Hour, 24 * time.Hour},
		{"10s", "overlap: {min: 4s}", 4 * time.Second, 5 * time.Second},
		{"10s", "overlap: {min: 7s}", 7 * time.Second, 7 * time.Second},
		{"1d", "overlap: {min: 2h, max: 3h}", 2 * time.Hour, 3 * time.Hour},
	} {
		text := strings.Replace(file, "every: 1d", "every: "+c.every, 1)
		if c.defaults != "" {
			text += "\ndefaults: {" + c.defaults + "}\n"
		}
		got, err := config.Parse("rekey.yaml", []byte(text), fakeKinds())
		if err != nil {
			t.Errorf("every %s, %s: %v", c.every, c.defaults, err)
			continue
		}
		if o := got.Credentials["orders/db"].Overlap; o.Min.D() != c.min || o.Max.D() != c.max {
			t.Errorf("every %s, %s: overlap %s to %s, want %s to %s", c.every, c.defaults, o.Min, o.Max, c.min, c.max)
		}
	}
}

func TestAnchorsAndMerge(t *testing.T) {
	text := strings.Replace(file, "credentials:\n  orders/db:\n", `credentials:
  orders/more:
    <<: *base
    roles: [more_a, more_b]
  orders/db: &base
`, 1)
	if _, err := config.Parse("rekey.yaml", []byte(text), fakeKinds()); err == nil || !strings.Contains(err.Error(), "there is no such anchor before it") {
		t.Errorf("an alias before its anchor: %v", err)
	}
	text = file + `  orders/more:
    <<: *base
    roles: [more_a, more_b]
`
	text = strings.Replace(text, "orders/db:", "orders/db: &base", 1)
	c, err := config.Parse("rekey.yaml", []byte(text), fakeKinds())
	if err != nil {
		t.Fatal(err)
	}
	a, b := c.Credentials["orders/db"], c.Credentials["orders/more"]
	if string(a.Fields) == string(b.Fields) || a.Purpose != b.Purpose || !strings.Contains(string(b.Fields), "more_a") {
		t.Errorf("merged wrongly: %s and %s", a.Fields, b.Fields)
	}
}

func TestLoadFile(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	c, err := config.Load(write("good.yaml", file, 0o644), fakeKinds())
	if err != nil || len(c.Warnings) != 0 || c.Path != filepath.Join(dir, "good.yaml") || c.Server.DataDir != filepath.Join(dir, "data") {
		t.Errorf("%v %+v", err, c)
	}
	c, err = config.Load(write("open.yaml", file, 0o666), fakeKinds())
	if err != nil || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0].String(), "everybody may write it (mode 0666)") {
		t.Errorf("%v %v", err, c.Warnings)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "absent.yaml"): "there is no such file",
		dir:                               "it is not a regular file",
		write("empty.yaml", "", 0o600):    "the file is empty",
		write("comment.yaml", "# nothing\n---\n", 0o600):                       "the file is empty",
		write("big.yaml", "# "+strings.Repeat("x", config.MaxFileSize), 0o600): "the file has more than 4 MiB",
	} {
		_, err := config.Load(path, fakeKinds())
		var ps config.Problems
		if !errors.As(err, &ps) || len(ps) != 1 || ps[0].Message != want || ps[0].File != path {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
	if os.Geteuid() != 0 {
		if _, err := config.Load(write("closed.yaml", file, 0), fakeKinds()); err == nil || !strings.Contains(err.Error(), "cannot be read: permission denied") {
			t.Errorf("%v", err)
		}
	}
}

// What a program may get wrong in its kinds is an error at once, not a surprise in a file.
func TestKindsAreChecked(t *testing.T) {
	type clash struct {
		Owner string `json:"owner"`
	}
	type plain struct {
		Password string `json:"password"`
	}
	for _, c := range []struct {
		credential any
		want       string
	}{
		{clash{}, `credential kind bad: its field "owner" has the name of one that every kind has`},
		{plain{}, `credential kind bad: its field "password" looks like a secret in plain text`},
		{3, `credential kind bad: int is not a struct`},
	} {
		kinds := fakeKinds()
		k := kinds.Targets["postgres"]
		k.Credential = c.credential
		kinds.Targets["bad"] = k
		if _, err := config.Schema(kinds); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%T: %v, want %q", c.credential, err, c.want)
		}
	}
	kinds := fakeKinds()
	k := kinds.Targets["postgres"]
	k.Traits = nil
	kinds.Targets["bad"] = k
	if _, err := config.Parse("x", config.Template(), kinds); err == nil || !strings.Contains(err.Error(), "has no Traits") {
		t.Errorf("%v", err)
	}
}
