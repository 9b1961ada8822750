package config

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/invopop/jsonschema"
	validator "github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/rekeyhq/rekey/internal/credential"
)

// The formats that have a meaning here. Others are left to whoever reads the schema.
const (
	formatReference = "reference"
	formatPath      = "path"
)

const durationPattern = `^([0-9]{1,5}d)?([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))*$`

// Schema is the JSON Schema (2020-12) of rekey.yaml for these kinds, indented.
func Schema(kinds Kinds) ([]byte, error) {
	s, err := compile(kinds)
	if err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(s.document, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("marshal schema: %w", err)
	}
	return append(b, '\n'), nil
}

// schema holds the schemas of the file's parts, each in the two forms that are needed: the tree to walk, and compiled.
type schema struct {
	document   *jsonschema.Schema // the whole file, for editors
	root       part               // the file without what is inside stores, targets and credentials
	store      map[string]part    // by kind
	target     map[string]part
	credential map[string]part
	unknown    map[string]part // the fields that all kinds share: target, credential
}

type part struct {
	tree     *jsonschema.Schema
	compiled *validator.Schema
}

func (p part) names() []string {
	var names []string
	for f := p.tree.Properties.Oldest(); f != nil; f = f.Next() {
		names = append(names, f.Key)
	}
	return names
}

// compile makes every schema. An error is a defect of the kinds, not of a file.
func compile(kinds Kinds) (*schema, error) {
	s := &schema{store: map[string]part{}, target: map[string]part{}, credential: map[string]part{}, unknown: map[string]part{}}
	doc := reflected(fileRoot{})
	doc.Version, doc.Title = jsonschema.Version, "rekey.yaml"
	doc.Definitions = jsonschema.Definitions{}
	var errs []error
	section := func(name, one string, base any, own map[string]any, parts map[string]part) {
		var choices []*jsonschema.Schema
		for _, kind := range slices.Sorted(maps.Keys(own)) {
			tree, err := entity(base, own[kind], kind)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s kind %s: %w", one, kind, err))
				continue
			}
			doc.Definitions[one+"_"+kind] = tree
			choices = append(choices, &jsonschema.Schema{Ref: "#/$defs/" + one + "_" + kind})
			parts[kind] = part{tree: tree}
		}
		p, _ := doc.Properties.Get(name)
		p.Type, p.AdditionalProperties = "object", &jsonschema.Schema{AnyOf: choices}
	}
	targets, credentials, stores := map[string]any{}, map[string]any{}, map[string]any{}
	for name, k := range kinds.Targets {
		targets[name], credentials[name] = k.Target, k.Credential
		if k.Traits == nil {
			errs = append(errs, fmt.Errorf("kind %s: has no Traits", name))
		}
	}
	for name, k := range kinds.Stores {
		stores[name] = k.Config
	}
	section("stores", "store", fileStore{}, stores, s.store)
	section("targets", "target", fileTarget{}, targets, s.target)
	section("credentials", "credential", fileCredential{}, credentials, s.credential)
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	s.document = doc

	open := func(v any) *jsonschema.Schema {
		tree := reflected(v)
		tree.AdditionalProperties = nil
		return tree
	}
	s.root.tree = reflected(fileRoot{})
	s.unknown["target"], s.unknown["credential"] = part{tree: open(fileTarget{})}, part{tree: open(fileCredential{})}
	var err error
	if s.root, err = s.root.compile("root"); err != nil {
		return nil, err
	}
	for name, parts := range map[string]map[string]part{"store": s.store, "target": s.target, "credential": s.credential, "unknown": s.unknown} {
		for kind, p := range parts {
			if parts[kind], err = p.compile(name + "_" + kind); err != nil {
				return nil, err
			}
		}
	}
	return s, nil
}

func (p part) compile(name string) (part, error) {
	b, err := json.Marshal(p.tree)
	if err != nil {
		return part{}, fmt.Errorf("marshal schema %s: %w", name, err)
	}
	doc, err := validator.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		return part{}, fmt.Errorf("read schema %s: %w", name, err)
	}
	c := validator.NewCompiler()
	if err := c.AddResource(name, doc); err != nil {
		return part{}, fmt.Errorf("add schema %s: %w", name, err)
	}
	if p.compiled, err = c.Compile(name); err != nil {
		return part{}, fmt.Errorf("compile schema %s: %w", name, err)
	}
	return p, nil
}

// secretName finds fields that hold secrets, to insist that they are references.
var secretName = regexp.MustCompile(`(^|_)(password|passphrase|secret|token|private_key|api_key)$`)

// entity is base with a provider's own fields. For a target or store the kind becomes a constant.
func entity(base, own any, kind string) (*jsonschema.Schema, error) {
	tree := reflected(base)
	if k, ok := tree.Properties.Get("kind"); ok {
		k.Const = kind
	}
	if own == nil {
		return tree, nil
	}
	added := reflected(own)
	if added.Properties == nil {
		return nil, fmt.Errorf("%T is not a struct", own)
	}
	for p := added.Properties.Oldest(); p != nil; p = p.Next() {
		if _, taken := tree.Properties.Get(p.Key); taken {
			return nil, fmt.Errorf("its field %q has the name of one that every kind has", p.Key)
		}
		tree.Properties.Set(p.Key, p.Value)
	}
	tree.Required = append(tree.Required, added.Required...)
	var errs []error
	each(added, "", func(path string, s *jsonschema.Schema) {
		if s.Type == "string" && secretName.MatchString(path[strings.LastIndexByte(path, '.')+1:]) && s.Format != formatReference {
			errs = append(errs, fmt.Errorf("its field %q looks like a secret in plain text: tag it jsonschema:\"format=reference\"", path))
		}
	})
	return tree, errors.Join(errs...)
}

// each visits every schema below s with its dotted path.
func each(s *jsonschema.Schema, path string, visit func(string, *jsonschema.Schema)) {
	visit(path, s)
	if s.Properties != nil {
		for p := s.Properties.Oldest(); p != nil; p = p.Next() {
			each(p.Value, strings.TrimPrefix(path+"."+p.Key, "."), visit)
		}
	}
	if s.Items != nil {
		each(s.Items, path+"[]", visit)
	}
	if s.AdditionalProperties != nil && s.AdditionalProperties.Type != "" {
		each(s.AdditionalProperties, path+".<name>", visit)
	}
}

// reflected is the schema of one struct, nothing referenced, unknown fields refused.
func reflected(v any) *jsonschema.Schema {
	r := jsonschema.Reflector{Anonymous: true, DoNotReference: true, ExpandedStruct: true, RequiredFromJSONSchemaTags: true, Mapper: mapped}
	s := r.Reflect(v)
	s.Version = ""
	each(s, "", func(_ string, s *jsonschema.Schema) {
		switch {
		case s.Format == formatReference:
			s.Pattern = referencePattern
		case s.Type == "object" && s.AdditionalProperties != nil && s.AdditionalProperties.Type == "string" && s.MaxProperties == nil:
			most := uint64(64)
			s.MaxProperties = &most
		}
	})
	return s
}

// mapped gives the types that are written as text their schema.
func mapped(t reflect.Type) *jsonschema.Schema {
	switch {
	case t == reflect.TypeFor[credential.Duration]():
		return &jsonschema.Schema{Type: "string", Pattern: durationPattern}
	case t == reflect.TypeFor[Reference]():
		return &jsonschema.Schema{Type: "string", Format: formatReference, Pattern: referencePattern}
	case t == reflect.TypeFor[time.Time]():
		return nil
	case reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()):
		return &jsonschema.Schema{Type: "string"}
	}
	return nil
}
