package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/invopop/jsonschema"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

// The defaults that are not in the schema because they depend on something else.
const (
	defaultStore       = "default"
	defaultConcurrency = 4
	defaultPort        = 4222
	defaultOverlapMin  = time.Hour
	defaultOverlapMax  = 24 * time.Hour
)

const nameRule = "want 1 to 63 characters a-z 0-9 _ - that begin and end with a letter or digit"

// checker goes through one file: first the form of each part against its schema, then, where the form is right, the meaning.
type checker struct {
	*report
	schema *schema
	kinds  Kinds
	dir    string // of the file: relative paths start there
	root   *node
	// The fields that entries of every kind have.
	storeFields, targetFields, credentialFields properties

	defaults fileDefaults
	targets  map[string]*credential.Target // nil value: it exists but is wrong
	kindName map[string]string             // of every target that names a known kind, wrong ones too
	stores   map[string]*Store
	claims   map[string]claimant
}

type claimant struct {
	id  string
	pos position
}

// entry is one member of stores, targets or credentials.
type entry struct {
	name string
	node *node
	path pathed
}

func (c *checker) check() Config {
	for i := range c.root.fields { // a section whose lines are all commented out is an absent one
		if f := &c.root.fields[i]; f.node.form == scalar && f.node.value == nil && f.name != "version" {
			f.node.form = mapping
		}
	}
	formed := c.against(c.schema.root, c.root, nil)
	var file fileRoot
	if formed {
		c.decode(c.schema.root.tree, c.root, nil, &file)
	} else if d := c.root.field("defaults"); d != nil { // so that credentials are not blamed for a missing interval
		_ = c.into(c.schema.root.tree, []string{"defaults"}, d, &file.Defaults)
	}
	c.defaults = file.Defaults
	out := Config{
		Server: c.server(file.Server), NATS: c.nats(file.NATS), Stores: map[string]Store{},
		Credentials: map[credential.ID]credential.Spec{}, Slots: map[credential.ID][]rotators.VersionID{},
	}
	c.stores, c.targets, c.claims, c.kindName = map[string]*Store{}, map[string]*credential.Target{}, map[string]claimant{}, map[string]string{}
	c.storeFields, c.targetFields = reflected(fileStore{}).Properties.Get, reflected(fileTarget{}).Properties.Get
	c.credentialFields = reflected(fileCredential{}).Properties.Get
	for _, e := range c.entries("stores") {
		c.stores[e.name] = c.store(e)
		if s := c.stores[e.name]; s != nil {
			out.Stores[e.name] = *s
		}
	}
	for _, e := range c.entries("targets") {
		c.targets[e.name] = c.target(e)
	}
	for _, name := range slices.Sorted(maps.Keys(c.targets)) {
		if t := c.targets[name]; t != nil {
			out.Targets = append(out.Targets, *t)
		}
	}
	for _, e := range c.entries("credentials") {
		id, err := credential.ParseID(e.name)
		if err != nil {
			c.add(e.node.key, e.path, "", "%s", strings.TrimPrefix(err.Error(), "credential "))
		}
		if spec, slots := c.credential(e); spec != nil && err == nil {
			out.Credentials[id] = *spec
			if slots != nil {
				out.Slots[id] = slots
			}
		}
	}
	return out
}

// entries are the members of a section that are mappings, with names checked except for credentials' ids.
func (c *checker) entries(section string) []entry {
	n := c.root.field(section)
	if n == nil {
		return nil
	}
	var out []entry
	for _, f := range n.fields {
		path := pathed{section, f.name}
		if section != "credentials" && !credential.ValidName(f.name) {
			c.add(f.node.key, path, "", "name: %s", nameRule)
		}
		if f.node.form != mapping {
			c.add(f.node.at, path, "", "want a mapping, not %s", f.node.describe())
			f.node = &node{form: mapping, key: f.node.key, at: f.node.at} // known by name, wrong: see nil in checker
			if section == "credentials" {
				continue
			}
		}
		out = append(out, entry{f.name, f.node, path})
	}
	return out
}

// kindOf is the entry's kind, if it is one of known; otherwise it reports why not.
func (c *checker) kindOf(e entry, known []string) (string, bool) {
	k := e.node.field("kind")
	slices.Sort(known)
	switch {
	case k == nil:
		if len(e.node.fields) > 0 {
			c.add(e.node.key, append(e.path, "kind"), "add kind: one of "+strings.Join(known, ", "), "missing")
		}
		return "", false
	case !slices.Contains(known, k.text()):
		remedy := guess(k.text(), known)
		if remedy == "" {
			remedy = "known: " + strings.Join(known, ", ")
		}
		c.add(k.at, append(e.path, "kind"), remedy, "%sthere is no such kind", shown(k, nil))
		return "", false
	}
	return k.text(), true
}

func (c *checker) store(e entry) *Store {
	kind, ok := c.kindOf(e, slices.Collect(maps.Keys(c.kinds.Stores)))
	if !ok {
		return nil
	}
	p := c.schema.store[kind]
	if !c.against(p, e.node, e.path) {
		return nil
	}
	fields := c.own(p.tree, e.node, c.storeFields)
	if !c.validateOwn(e, c.kinds.Stores[kind].Config, fields) {
		return nil
	}
	return &Store{Kind: kind, Fields: fields}
}

func (c *checker) target(e entry) *credential.Target {
	kind, ok := c.kindOf(e, slices.Collect(maps.Keys(c.kinds.Targets)))
	if !ok {
		if e.node.field("kind") != nil {
			c.against(c.schema.unknown["target"], e.node, e.path)
		}
		return nil
	}
	c.kindName[e.name] = kind
	p := c.schema.target[kind]
	if !c.against(p, e.node, e.path) {
		return nil
	}
	before := len(c.problems)
	var f fileTarget
	c.shared(p.tree, e, c.targetFields, &f)
	t := &credential.Target{
		Name: e.name, Kind: kind, Environment: f.Environment, Owner: f.Owner, Exclusive: f.Exclusive,
		Concurrency:  orElse(f.Concurrency, defaultConcurrency),
		StepDeadline: first(f.StepDeadline, credential.Duration(credential.DefaultStepDeadline)),
		Fields:       c.own(p.tree, e.node, c.targetFields),
	}
	if t.StepDeadline.D() < credential.MinStepDeadline {
		c.at(e, "", "%s: the least is %s", []any{t.StepDeadline, credential.MinStepDeadline}, "step_deadline")
	}
	for _, name := range []string{"environment", "owner"} {
		if strings.TrimSpace(e.node.field(name).text()) == "" {
			c.at(e, "", "is blank", nil, name)
		}
	}
	if !c.validateOwn(e, c.kinds.Targets[kind].Target, t.Fields) || len(c.problems) > before {
		return nil
	}
	return t
}

func (c *checker) credential(e entry) (*credential.Spec, []rotators.VersionID) {
	target, kindName := c.targetOf(e)
	p, known := c.schema.credential[kindName]
	if !known {
		p = c.schema.unknown["credential"]
	}
	if !c.against(p, e.node, e.path) || target == nil { // the target's absence, or what is wrong with it, is reported
		return nil, nil
	}
	kind := c.kinds.Targets[kindName]
	before := len(c.problems)
	var f fileCredential
	c.shared(p.tree, e, c.credentialFields, &f)
	spec := c.spec(e, f, target)
	spec.Fields = c.own(p.tree, e.node, c.credentialFields)
	c.deputy(e, f, target)
	if !c.validateOwn(e, kind.Credential, spec.Fields) {
		return nil, nil
	}
	if kind.Validate != nil {
		c.validated(e.node, e.path, kind.Validate(target.Fields, spec.Fields))
	}
	traits, err := kind.Traits(target.Fields, spec.Fields)
	if err != nil {
		c.validated(e.node, e.path, err)
		return nil, nil
	}
	spec.Traits = traits
	c.validated(e.node, e.path, spec.Validate())
	c.claim(e, kind, target, spec.Fields)
	var slots []rotators.VersionID
	if kind.Slots != nil {
		slots = kind.Slots(target.Fields, spec.Fields)
		if spec.Adopt != nil && !slices.Contains(slots, spec.Adopt.Version) {
			c.at(e, "", "%q is not one of the versions that this credential may have: %s", []any{clip(string(spec.Adopt.Version)), joined(slots)}, "adopt", "version")
		}
	}
	if len(c.problems) > before {
		return nil, nil
	}
	return spec, slots
}

// spec fills in every default.
func (c *checker) spec(e entry, f fileCredential, target *credential.Target) *credential.Spec {
	spec := &credential.Spec{
		Target: target.Name, Kind: target.Kind, Exclusive: target.Exclusive,
		Store: orElse(f.Store, orElse(c.defaults.Store, defaultStore)),
		Owner: f.Owner, Environment: f.Environment, Purpose: f.Purpose, Labels: f.Labels, AllowGap: f.AllowGap,
		Jitter:       first(f.Jitter, first(c.defaults.Jitter, 0)),
		StepDeadline: first(f.StepDeadline, first(c.defaults.StepDeadline, target.StepDeadline)),
	}
	c.exists(e, "store", spec.Store, slices.Sorted(maps.Keys(c.stores)))
	switch {
	case f.Every != nil:
		spec.Every = *f.Every
	case c.defaults.Every != nil:
		spec.Every = *c.defaults.Every
	default:
		c.add(e.node.key, append(e.path, "every"), "say every: 30d here or under defaults, or every: 0s to rotate only on request", "missing")
	}
	least, most := defaultOverlapMin, defaultOverlapMax
	if spec.Every > 0 {
		least, most = min(least, spec.Every.D()/4), min(most, spec.Every.D()/2)
	}
	spec.Overlap.Min = first(f.Overlap.Min, first(c.defaults.Overlap.Min, credential.Duration(least)))
	spec.Overlap.Max = first(f.Overlap.Max, first(c.defaults.Overlap.Max, max(credential.Duration(most), spec.Overlap.Min)))
	if spec.Jitter > 0 && spec.Jitter >= spec.Every {
		c.at(e, "", "%s: must be shorter than every %s", []any{spec.Jitter, spec.Every}, "jitter")
	}
	for _, consumer := range f.Consumers {
		spec.Consumers = append(spec.Consumers, credential.Consumer(consumer))
	}
	if f.Adopt != nil {
		spec.Adopt = &credential.Adopt{Version: rotators.VersionID(f.Adopt.Version), Material: map[string]string{}}
		for name, ref := range f.Adopt.Material {
			spec.Adopt.Material[name] = string(ref)
		}
	}
	return spec
}

// targetOf is the target that e names and its kind; nil if there is none, which is reported, or if it is wrong itself.
func (c *checker) targetOf(e entry) (*credential.Target, string) {
	name := e.node.field("target").text()
	if name == "" {
		return nil, "" // the schema reports it
	}
	c.exists(e, "target", name, slices.Sorted(maps.Keys(c.targets)))
	return c.targets[name], c.kindName[name]
}

func (c *checker) exists(e entry, what, name string, known []string) {
	if slices.Contains(known, name) {
		return
	}
	remedy := guess(name, known)
	if remedy == "" {
		remedy = "add it under " + what + "s:"
	}
	c.at(e, remedy, "there is no %s %q", []any{what, clip(name)}, what)
}

// deputy keeps a credential from borrowing the admin access of another team or environment.
func (c *checker) deputy(e entry, f fileCredential, t *credential.Target) {
	for _, p := range []struct{ field, mine, its string }{{"owner", f.Owner, t.Owner}, {"environment", f.Environment, t.Environment}} {
		if p.mine != p.its {
			c.at(e, "", "%q, but target %s has %q: a credential may only use a target of its own %s", []any{clip(p.mine), t.Name, clip(p.its), p.field}, p.field)
		}
	}
}

func (c *checker) claim(e entry, kind Kind, t *credential.Target, fields json.RawMessage) {
	if kind.Claims == nil {
		return
	}
	issuer := "target " + t.Name
	if kind.Issuer != nil {
		issuer = "issuer " + kind.Issuer(t.Fields)
	}
	for _, claim := range kind.Claims(t.Fields, fields) {
		key := t.Kind + "\x00" + issuer + "\x00" + claim
		if other, taken := c.claims[key]; taken && other.id != e.name {
			c.add(e.node.key, e.path, "give each credential its own", "claims %s, which %s (line %d) claims already at the same %s", clip(claim), clip(other.id), other.pos.line, strings.Fields(issuer)[0])
			continue
		}
		c.claims[key] = claimant{e.name, e.node.key}
	}
}

// at reports a problem of one field of an entry, at the entry itself where the field comes from a default.
func (c *checker) at(e entry, remedy, format string, args []any, fields ...string) {
	pos := e.node.key
	if n, ok := e.node.find(fields); ok {
		pos = n.at
	}
	c.add(pos, append(slices.Clone(e.path), fields...), remedy, format, args...)
}

// properties looks up one of a schema's fields.
type properties func(name string) (*jsonschema.Schema, bool)

// own is the JSON of the fields that are not among the shared ones, paths absolute; nil if there are none.
func (c *checker) own(tree *jsonschema.Schema, n *node, shared properties) json.RawMessage {
	m, _ := placed(tree, n.generic(), c.dir).(map[string]any)
	for name := range m {
		if _, ok := shared(name); ok {
			delete(m, name)
		}
	}
	if len(m) == 0 {
		return nil
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic("decoded YAML cannot be marshalled: " + err.Error()) // only plain values: cannot happen
	}
	return b
}

// shared decodes the fields that every kind has.
func (c *checker) shared(tree *jsonschema.Schema, e entry, shared properties, into any) {
	part := &node{form: mapping, key: e.node.key, at: e.node.at}
	for _, f := range e.node.fields {
		if _, ok := shared(f.name); ok {
			part.fields = append(part.fields, f)
		}
	}
	c.decode(tree, part, e.path, into)
}

func (c *checker) decode(tree *jsonschema.Schema, n *node, path pathed, into any) {
	if err := c.into(tree, nil, n, into); err != nil {
		c.validated(n, path, err)
	}
}

func (c *checker) into(tree *jsonschema.Schema, below []string, n *node, into any) error {
	b, err := json.Marshal(placed(descend(tree, below), n.generic(), c.dir))
	if err != nil {
		return err
	}
	return strict(b, into)
}

// validateOwn decodes a provider's fields into its own type and asks its Validate method, if it has one.
func (c *checker) validateOwn(e entry, zero any, fields json.RawMessage) bool {
	if zero == nil {
		return true
	}
	v := reflect.New(reflect.TypeOf(zero))
	if fields == nil {
		fields = json.RawMessage("{}")
	}
	err := strict(fields, v.Interface())
	if err == nil {
		if checked, ok := v.Interface().(interface{ Validate() error }); ok {
			err = checked.Validate()
		}
	}
	c.validated(e.node, e.path, err)
	return err == nil
}

// strict decodes JSON that the schema has accepted; what the schema could not tell becomes an error without values.
func strict(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	var te *json.UnmarshalTypeError
	if errors.As(err, &te) {
		return errors.New(orElse(te.Field, "value") + ": does not fit a " + te.Type.String())
	}
	return err
}

func orElse[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

func first[T any](v *T, otherwise T) T {
	if v == nil {
		return otherwise
	}
	return *v
}

func joined(ids []rotators.VersionID) string {
	s := make([]string, len(ids))
	for i, id := range ids {
		s[i] = string(id)
	}
	return strings.Join(s, ", ")
}
