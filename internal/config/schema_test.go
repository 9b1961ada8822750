package config_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/rekeyhq/rekey/internal/config"
)

// The whole schema is for editors; files are checked part by part. Both have to agree on what is right. That the committed
// schema and reference page are those of the real kinds is tested in cmd/rekey.
func TestSchemaIsForEditors(t *testing.T) {
	b, err := config.Schema(fakeKinds())
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("rekey.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("rekey.json")
	if err != nil {
		t.Fatal(err)
	}
	valid := func(text string) error {
		t.Helper()
		j, err := yaml.YAMLToJSON([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(j))
		if err != nil {
			t.Fatal(err)
		}
		return s.Validate(v)
	}
	for _, text := range []string{file, string(config.Template())} {
		if err := valid(text); err != nil {
			t.Errorf("refused: %v", err)
		}
	}
	for _, r := range []struct{ old, new string }{
		{"every: 1d", "evry: 1d"}, {"every: 1d", "every: 1"}, {"    owner: team-orders\n", ""}, {"password: file:./admin", "password: hunter2"},
		{"kind: postgres", "kind: oracle"}, {"version: 1", "version: 2"}, {"    roles: [orders_a, orders_b]\n", ""}, {"host: localhost", "hosts: localhost"}, {"dir: ./secrets", "folder: x"},
	} {
		if valid(strings.Replace(file, r.old, r.new, 1)) == nil {
			t.Errorf("accepted %q in place of %q", r.new, r.old)
		}
	}
	again, err := config.Schema(fakeKinds())
	if err != nil || !bytes.Equal(b, again) {
		t.Errorf("another schema the second time: %v", err)
	}
}

func TestMarkdown(t *testing.T) {
	b, err := config.Markdown(fakeKinds())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| **`version`** | `1` |", "## Targets of kind `postgres`, in addition", "| **`admin.password`** | reference |  | The admin's password. |",
		"| `tls.ca_file` | path |", "| `overlap.min` | duration |", "| **`consumers[].name`** | text |", "| **`adopt.material`** | mapping of reference |", "| `concurrency` | number | `4` |",
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("lacks %q", want)
		}
	}
}
