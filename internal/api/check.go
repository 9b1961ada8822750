package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

// problem is one thing wrong with what a client declares. It names the object, never a value that may be a secret.
type problem struct{ location, message string }

// checker looks at a whole declaration. The client has done so too; the server does not rely on it.
type checker struct {
	kinds    config.Kinds
	store    func(string) bool
	problems []problem
	targets  map[string]credential.Target
	claims   map[string]string // who claims what at an issuer
}

func (c *checker) add(location, format string, args ...any) {
	c.problems = append(c.problems, problem{location, fmt.Sprintf(format, args...)})
}

func (c *checker) addAll(location string, err error) {
	if err == nil {
		return
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		c.add(location, "%s", line)
	}
}

// check returns the declaration as it will be written: fields in one canonical form, traits as the kind says.
func (c *checker) check(targets []credential.Target, specs map[credential.ID]credential.Spec) config.Config {
	out := config.Config{Credentials: map[credential.ID]credential.Spec{}, Slots: map[credential.ID][]rotators.VersionID{}}
	c.targets, c.claims = map[string]credential.Target{}, map[string]string{}
	for _, t := range byName(targets) {
		at := "targets." + clip(t.Name)
		if _, twice := c.targets[t.Name]; twice {
			c.add(at, "declared twice")
		}
		t.Fields = c.canonical(at, t.Fields)
		c.target(at, t)
		c.targets[t.Name] = t
		out.Targets = append(out.Targets, t)
	}
	for _, id := range sortedIDs(specs) {
		at := "credentials." + clip(string(id))
		if _, err := credential.ParseID(string(id)); err != nil {
			c.add(at, "%v", err)
			continue
		}
		spec := specs[id]
		spec.Fields = c.canonical(at, spec.Fields)
		if slots := c.credential(at, id, &spec); slots != nil {
			out.Slots[id] = slots
		}
		out.Credentials[id] = spec
	}
	return out
}

func (c *checker) target(at string, t credential.Target) {
	if !validName(t.Name) {
		c.add(at, "name: want 1 to 63 characters a-z 0-9 _ -")
	}
	kind, known := c.kinds.Targets[t.Kind]
	if !known {
		c.add(at, "there is no kind %q on this server", clip(t.Kind))
	}
	if strings.TrimSpace(t.Owner) == "" || strings.TrimSpace(t.Environment) == "" {
		c.add(at, "owner and environment are required")
	}
	if t.Concurrency < 1 || t.Concurrency > 1000 {
		c.add(at, "concurrency %d: want 1 to 1000", t.Concurrency)
	}
	if t.StepDeadline.D() < credential.MinStepDeadline {
		c.add(at, "step_deadline %s: the least is %s", t.StepDeadline, credential.MinStepDeadline)
	}
	if known {
		c.own(at, kind.Target, t.Fields)
	}
}

// credential checks one spec against its target and returns its slots, if its kind has a fixed set.
func (c *checker) credential(at string, id credential.ID, spec *credential.Spec) []rotators.VersionID {
	t, declared := c.targets[spec.Target]
	kind, known := c.kinds.Targets[t.Kind]
	if !declared {
		c.add(at, "target: there is no target %q", clip(spec.Target))
	}
	if !declared || !known {
		return nil
	}
	for _, p := range []struct{ field, mine, its string }{{"kind", spec.Kind, t.Kind}, {"owner", spec.Owner, t.Owner}, {"environment", spec.Environment, t.Environment}} {
		if p.mine != p.its {
			c.add(at, "%s: %q, but target %s has %q", p.field, clip(p.mine), t.Name, clip(p.its))
		}
	}
	if !c.store(spec.Store) {
		c.add(at, "store: this server has no store %q; it reads its stores from its configuration when it starts", clip(spec.Store))
	}
	before := len(c.problems)
	c.own(at, kind.Credential, spec.Fields)
	if len(c.problems) > before {
		return nil
	}
	spec.Exclusive = t.Exclusive
	if kind.Validate != nil {
		c.addAll(at, kind.Validate(t.Fields, spec.Fields))
	}
	traits, err := kind.Traits(t.Fields, spec.Fields)
	if err != nil {
		c.addAll(at, err)
		return nil
	}
	spec.Traits = traits
	c.addAll(at, spec.Validate())
	c.claim(at, string(id), kind, t, spec.Fields)
	if kind.Slots == nil {
		return nil
	}
	return kind.Slots(t.Fields, spec.Fields)
}

// claim keeps two credentials from changing the same thing at one issuer.
func (c *checker) claim(at, id string, kind config.Kind, t credential.Target, fields json.RawMessage) {
	if kind.Claims == nil {
		return
	}
	issuer := "target " + t.Name
	if kind.Issuer != nil {
		issuer = "issuer " + kind.Issuer(t.Fields)
	}
	for _, claim := range kind.Claims(t.Fields, fields) {
		key := t.Kind + "\x00" + issuer + "\x00" + claim
		if other, taken := c.claims[key]; taken && other != id {
			c.add(at, "claims %s, which %s claims already at the same issuer", clip(claim), other)
			continue
		}
		c.claims[key] = id
	}
}

// standing adds the claims of what exists and is not declared: its versions are still in use.
func (c *checker) standing(records []credential.Record, targets []credential.Target) {
	for _, r := range records {
		kind, known := c.kinds.Targets[r.Spec.Kind]
		i := slices.IndexFunc(targets, func(t credential.Target) bool { return t.Name == r.Spec.Target })
		if !known || i < 0 || len(r.Live()) == 0 && len(r.Dead) == 0 {
			continue
		}
		c.claim("credentials."+string(r.ID)+" (not declared; its versions are still in use)", string(r.ID), kind, targets[i], r.Spec.Fields)
	}
}

// own decodes a provider's fields into its own type and asks its Validate method, if it has one.
func (c *checker) own(at string, zero any, fields json.RawMessage) {
	if zero == nil {
		return
	}
	v := reflect.New(reflect.TypeOf(zero))
	if fields == nil {
		fields = json.RawMessage("{}")
	}
	d := json.NewDecoder(bytes.NewReader(fields))
	d.DisallowUnknownFields()
	if err := d.Decode(v.Interface()); err != nil {
		c.add(at, "fields do not fit the kind: %s", decodeProblem(err))
		return
	}
	if checked, ok := v.Interface().(interface{ Validate() error }); ok {
		c.addAll(at, checked.Validate())
	}
}

// decodeProblem is what an error of encoding/json says, without the value.
func decodeProblem(err error) string {
	if te, ok := err.(*json.UnmarshalTypeError); ok { //nolint:errorlint // the decoder returns it bare
		return te.Field + " wants a " + te.Type.String()
	}
	return clip(err.Error())
}

// canonical is raw as the ledger writes it, so that the same declaration is the same bytes; nil for nothing.
func (c *checker) canonical(at string, raw json.RawMessage) json.RawMessage {
	if len(raw) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var m map[string]any
	if err := d.Decode(&m); err != nil {
		c.add(at, "fields: want an object")
		return nil
	}
	if len(m) == 0 {
		return nil
	}
	b, err := json.Marshal(m)
	if err != nil {
		c.add(at, "fields: %v", err)
	}
	return b
}

func byName(targets []credential.Target) []credential.Target {
	return slices.SortedFunc(slices.Values(targets), func(a, b credential.Target) int { return strings.Compare(a.Name, b.Name) })
}
