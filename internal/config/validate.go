package config

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/invopop/jsonschema"
	validator "github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"
	"golang.org/x/text/language"
	"golang.org/x/text/message"

	"github.com/rekeyhq/rekey/internal/credential"
)

const (
	referenceMessage = "want a reference to a secret, not the secret itself"
	referenceRemedy  = "put the secret into a file (chmod 600) and write file:/path/to/it here, or env:NAME"
)

// against reports everything in which n differs from the schema, and whether there was nothing.
func (r *report) against(p part, n *node, path pathed) bool {
	err := p.compiled.Validate(n.generic())
	var ve *validator.ValidationError
	if errors.As(err, &ve) {
		r.invalid(p.tree, ve, n, path)
		return false
	}
	return r.durations(p.tree, n, path)
}

// durations reports every duration that has the right form and does not fit.
func (r *report) durations(s *jsonschema.Schema, n *node, path pathed) bool {
	if s.Pattern == durationPattern {
		var d credential.Duration
		if err := d.UnmarshalText([]byte(n.text())); err != nil || d < 0 {
			r.add(n.at, path, "0s is none", "%snot a duration that can be counted", shown(n, path))
			return false
		}
	}
	ok := true
	for _, f := range n.fields {
		if below := descend(s, []string{f.name}); below != nil {
			ok = r.durations(below, f.node, append(slices.Clone(path), f.name)) && ok
		}
	}
	return ok
}

func (r *report) invalid(tree *jsonschema.Schema, ve *validator.ValidationError, n *node, path pathed) {
	if len(ve.Causes) > 0 {
		for _, c := range ve.Causes {
			r.invalid(tree, c, n, path)
		}
		return
	}
	at, _ := n.find(ve.InstanceLocation)
	where := append(slices.Clone(path), ve.InstanceLocation...)
	s := descend(tree, ve.InstanceLocation)
	if s == nil {
		s = &jsonschema.Schema{}
	}
	switch k := ve.ErrorKind.(type) {
	case *kind.AdditionalProperties:
		for _, name := range k.Properties {
			r.unknownKey(s, at, where, name)
		}
	case *kind.Required:
		for _, name := range k.Missing {
			remedy := "add " + name + ":"
			if f := descend(s, []string{name}); f != nil && f.Description != "" {
				remedy = "add " + name + ": — " + strings.TrimSuffix(f.Description, ".")
			}
			r.add(at.key, append(where, name), remedy, "missing")
		}
	case *kind.Type:
		if s.Format == formatReference {
			r.add(at.at, where, referenceRemedy, referenceMessage)
			return
		}
		r.add(at.at, where, example(s), "want %s, not %s", wanted(k.Want), at.describe())
	case *kind.Pattern:
		switch k.Want {
		case referencePattern:
			r.add(at.at, where, referenceRemedy, referenceMessage)
		case durationPattern:
			r.add(at.at, where, "", "%swant a duration: a number with a unit, such as 90s, 12h or 30d", shown(at, where))
		default:
			r.add(at.at, where, "", "%sdoes not match %s", shown(at, where), k.Want)
		}
	case *kind.Enum, *kind.Const:
		var choices []string
		for _, c := range s.Enum {
			choices = append(choices, fmt.Sprint(c))
		}
		if s.Const != nil {
			choices = []string{fmt.Sprint(s.Const)}
		}
		r.add(at.at, where, guess(at.text(), choices), "%swant %s", shown(at, where), strings.Join(choices, ", "))
	case *kind.MinLength:
		r.add(at.at, where, "", "is empty")
	default:
		r.add(at.at, where, "", "%s", ve.ErrorKind.LocalizedString(message.NewPrinter(language.English)))
	}
}

func (r *report) unknownKey(s *jsonschema.Schema, parent *node, where pathed, name string) {
	pos := parent.at
	if f := parent.field(name); f != nil {
		pos = f.key
	}
	remedy := "remove it"
	if s.Properties != nil {
		known := part{tree: s}.names()
		if g := nearest(name, known); g != "" {
			remedy = "did you mean " + g + "?"
		} else if len(known) > 0 {
			remedy = "known here: " + strings.Join(known, ", ")
		}
	}
	r.add(pos, append(slices.Clone(where), name), remedy, "unknown key")
}

func guess(s string, choices []string) string {
	if g := nearest(s, choices); g != "" && s != "" {
		return "did you mean " + g + "?"
	}
	return ""
}

// shown is the value in quotes, unless its name says that it may be a secret.
func shown(n *node, where pathed) string {
	for _, p := range where {
		for _, word := range []string{"password", "secret", "token", "key", "creds", "dsn", "material"} {
			if strings.Contains(p, word) {
				return ""
			}
		}
	}
	switch n.value.(type) {
	case nil:
		return ""
	case string:
		return strconv.Quote(clip(n.text())) + ": "
	default:
		return fmt.Sprint(n.value) + ": "
	}
}

func wanted(types []string) string {
	names := map[string]string{"object": "a mapping", "array": "a list", "string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "nothing"}
	var out []string
	for _, t := range types {
		out = append(out, names[t])
	}
	return strings.Join(out, " or ")
}

// example is a remedy for a value of the wrong type.
func example(s *jsonschema.Schema) string {
	switch {
	case s.Pattern == durationPattern:
		return "write a number with a unit, such as 90s, 12h or 30d"
	case s.Type == "string":
		return "put it between quotes"
	default:
		return ""
	}
}

// descend finds the schema of what stands at path; nil if there is none.
func descend(s *jsonschema.Schema, path []string) *jsonschema.Schema {
	for _, p := range path {
		switch {
		case s.Properties != nil:
			next, ok := s.Properties.Get(p)
			if !ok {
				return nil
			}
			s = next
		case s.Items != nil:
			s = s.Items
		case s.AdditionalProperties != nil:
			s = s.AdditionalProperties
		default:
			return nil
		}
	}
	return s
}

// placed is v with every path and file reference made absolute, as the schema marks them.
func placed(s *jsonschema.Schema, v any, dir string) any {
	switch v := v.(type) {
	case map[string]any:
		for name, child := range v {
			if cs := descend(s, []string{name}); cs != nil {
				v[name] = placed(cs, child, dir)
			}
		}
	case []any:
		if s.Items != nil {
			for i := range v {
				v[i] = placed(s.Items, v[i], dir)
			}
		}
	case string:
		switch s.Format {
		case formatReference:
			return string(Reference(v).within(dir))
		case formatPath:
			return absolute(dir, v)
		}
	}
	return v
}
