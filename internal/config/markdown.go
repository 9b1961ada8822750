package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/invopop/jsonschema"
)

// Markdown is the reference page of rekey.yaml for these kinds, made from the schema.
func Markdown(kinds Kinds) ([]byte, error) {
	s, err := compile(kinds)
	if err != nil {
		return nil, err
	}
	var b strings.Builder
	b.WriteString("# rekey.yaml\n\nMade by `task generate` from the schema. A field in **bold** is required. An unknown key is an error.\n")
	fmt.Fprintf(&b, "\nDurations are text: `90s`, `12h`, `30d`. A *reference* is `file:/path` (only its owner may read the file) or `env:NAME`. ")
	fmt.Fprintf(&b, "Paths are relative to the file's directory. The file has at most %d MiB, nests at most %d levels and is one document.\n", MaxFileSize>>20, maxDepth)

	table(&b, "The file", s.root.tree, nil)
	for _, section := range []struct {
		title, what string
		shared      *jsonschema.Schema
		parts       map[string]part
	}{
		{"Stores", "stores.NAME", reflected(fileStore{}), s.store},
		{"Targets", "targets.NAME", reflected(fileTarget{}), s.target},
		{"Credentials", "credentials.TEAM/NAME", reflected(fileCredential{}), s.credential},
	} {
		table(&b, fmt.Sprintf("%s: `%s`", section.title, section.what), section.shared, nil)
		for _, kind := range slices.Sorted(maps.Keys(section.parts)) {
			shared := section.shared.Properties
			table(&b, fmt.Sprintf("%s of kind `%s`, in addition", section.title, kind), section.parts[kind].tree, func(name string) bool {
				_, ok := shared.Get(name)
				return ok
			})
		}
	}
	return []byte(b.String()), nil
}

// table writes one section, without the top-level fields that skip names; nothing if no field is left.
func table(b *strings.Builder, title string, s *jsonschema.Schema, skip func(string) bool) {
	var rows strings.Builder
	fields(&rows, s, "", skip)
	if rows.Len() > 0 {
		fmt.Fprintf(b, "\n## %s\n\n| field | type | default | |\n|---|---|---|---|\n%s", title, rows.String())
	}
}

func fields(b *strings.Builder, s *jsonschema.Schema, prefix string, skip func(string) bool) {
	if s.Properties == nil {
		return
	}
	for p := s.Properties.Oldest(); p != nil; p = p.Next() {
		if skip != nil && skip(p.Key) {
			continue
		}
		name := "`" + prefix + p.Key + "`"
		if slices.Contains(s.Required, p.Key) {
			name = "**" + name + "**"
		}
		value := ""
		if p.Value.Default != nil {
			value = fmt.Sprintf("`%v`", p.Value.Default)
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s |\n", name, typeName(p.Value), value, strings.NewReplacer("|", "\\|", "<", "&lt;").Replace(p.Value.Description))
		fields(b, p.Value, prefix+p.Key+".", nil)
		if p.Value.Items != nil {
			fields(b, p.Value.Items, prefix+p.Key+"[].", nil)
		}
	}
}

func typeName(s *jsonschema.Schema) string {
	switch {
	case s.Format == formatReference:
		return "reference"
	case s.Format == formatPath:
		return "path"
	case s.Pattern == durationPattern:
		return "duration"
	case len(s.Enum) > 0:
		var names []string
		for _, e := range s.Enum {
			names = append(names, fmt.Sprintf("`%v`", e))
		}
		return strings.Join(names, ", ")
	case s.Type == "array" && s.Items != nil:
		return "list of " + typeName(s.Items)
	case s.Type == "object" && s.Properties == nil && s.AdditionalProperties != nil && s.AdditionalProperties.Type != "":
		return "mapping of " + typeName(s.AdditionalProperties)
	}
	names := map[string]string{"object": "mapping", "string": "text", "integer": "number", "boolean": "true/false"}
	if n := names[s.Type]; n != "" {
		return n
	}
	return s.Type
}
