package config

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

// Action is what applying would do with one object.
type Action string

// Nothing is ever revoked or deleted at an issuer or in a store by applying.
const (
	Create   Action = "create"   // new; a credential's first rotation makes its first version
	Adopting Action = "adopt"    // new, but its version exists already and stays
	Update   Action = "update"   // declared differently from now on
	Manage   Action = "manage"   // it had left the configuration and is back
	Unmanage Action = "unmanage" // it left the configuration: it stops rotating and keeps working
	Remove   Action = "remove"   // a target that nothing refers to any more
	Keep     Action = "keep"     // a target that left the configuration while a credential still lives there
	None     Action = "none"     // as declared
	Refused  Action = "refused"  // cannot be done; Reason says why, and nothing of the plan should be applied
)

// Change is what applying would do with one target or credential.
type Change struct {
	Object string  `json:"object"` // target or credential
	ID     string  `json:"id"`
	Action Action  `json:"action"`
	Fields []Field `json:"fields,omitempty"` // what differs, for update and manage
	// Reason explains, and for Refused says what to do instead.
	Reason string `json:"reason,omitempty"`
}

// Field is one field that differs. From and To are JSON; empty means absent.
type Field struct {
	Path string `json:"path"`
	From string `json:"from,omitempty"`
	To   string `json:"to,omitempty"`
}

// String is the change for an operator to read: one line, and one more for each field.
func (c Change) String() string {
	mark := map[Action]string{Create: "+", Adopting: "+", Manage: "+", Update: "~", Unmanage: "-", Remove: "-", Keep: " ", None: " ", Refused: "!"}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s: %s", mark[c.Action], c.Object, c.ID, c.Action)
	if c.Reason != "" {
		b.WriteString(": " + c.Reason)
	}
	for _, f := range c.Fields {
		switch {
		case f.From == "":
			fmt.Fprintf(&b, "\n    %s: %s (new)", f.Path, f.To)
		case f.To == "":
			fmt.Fprintf(&b, "\n    %s: %s (removed)", f.Path, f.From)
		default:
			fmt.Fprintf(&b, "\n    %s: %s -> %s", f.Path, f.From, f.To)
		}
	}
	return b.String()
}

// Plan compares what the ledger holds with the desired state: targets first, then credentials, each by name, one Change for
// every object on either side. It has no effect.
func Plan(current []credential.Record, targets []credential.Target, desired Config) []Change {
	return slices.Concat(planTargets(current, targets, desired), planCredentials(current, desired))
}

func planTargets(current []credential.Record, targets []credential.Target, desired Config) []Change {
	have, want := map[string]credential.Target{}, map[string]credential.Target{}
	for _, t := range targets {
		have[t.Name] = t
	}
	for _, t := range desired.Targets {
		want[t.Name] = t
	}
	var out []Change
	for _, name := range union(have, want) {
		old, existed := have[name]
		t, wanted := want[name]
		ch := Change{Object: "target", ID: name}
		switch {
		case !existed:
			ch.Action = Create
		case !wanted:
			ch.Action = Remove
			if id := livesAt(current, name); id != "" {
				ch.Action, ch.Reason = Keep, fmt.Sprintf("%s has live versions there", id)
			}
		case old.Kind != t.Kind && livesAt(current, name) != "":
			id := livesAt(current, name)
			ch.Action, ch.Reason = Refused, fmt.Sprintf("its kind would change from %s to %s while %s has live versions there; declare a new target under another name", old.Kind, t.Kind, id)
		default:
			ch.Fields = differences(old, t)
			ch.Action = changed(ch.Fields)
		}
		out = append(out, ch)
	}
	return out
}

// livesAt is the first credential with a live version at the target, or "".
func livesAt(current []credential.Record, target string) credential.ID {
	var ids []credential.ID
	for _, r := range current {
		if r.Spec.Target == target && holds(r) {
			ids = append(ids, r.ID)
		}
	}
	if len(ids) == 0 {
		return ""
	}
	return slices.Min(ids)
}

// holds reports whether something of the credential exists at its issuer or in its store, or is being made.
func holds(r credential.Record) bool {
	return r.Candidate != nil || r.Current != nil || r.Old != nil || len(r.Dead) > 0 || !settled(r)
}

// settled reports whether nothing is in flight.
func settled(r credential.Record) bool {
	return r.Phase == credential.Idle || r.Phase == credential.Suspended || r.Phase == ""
}

func planCredentials(current []credential.Record, desired Config) []Change {
	have := map[credential.ID]credential.Record{}
	for _, r := range current {
		have[r.ID] = r
	}
	var out []Change
	for _, id := range union(have, desired.Credentials) {
		r, existed := have[id]
		spec, wanted := desired.Credentials[id]
		ch := Change{Object: "credential", ID: string(id)}
		switch {
		case !existed && spec.Adopt != nil:
			ch.Action, ch.Reason = Adopting, fmt.Sprintf("%s stays as it is and is published to store %s", spec.Adopt.Version, spec.Store)
		case !existed:
			ch.Action = Create
		case !wanted && !r.Managed:
			ch.Action, ch.Reason = None, "unmanaged already"
		case !wanted:
			ch.Action, ch.Reason = Unmanage, "it stops rotating; nothing is revoked or deleted"
			if !settled(r) {
				ch.Reason = fmt.Sprintf("the rotation that is at %q is finished first; then it stops rotating; nothing is revoked or deleted", r.Phase)
			}
		default:
			if reason := impossible(r, spec, desired.Slots[id]); reason != "" {
				ch.Action, ch.Reason = Refused, reason
				break
			}
			before := r.Spec
			if r.Phase != credential.Adopting { // adoption counts once
				before.Adopt, spec.Adopt = nil, nil
			}
			ch.Fields = differences(before, spec)
			if ch.Action = changed(ch.Fields); !r.Managed {
				ch.Action = Manage
			}
		}
		out = append(out, ch)
	}
	return out
}

// impossible says why a record cannot take over a spec, or "". What exists at an issuer or in a store cannot be moved: a later
// step would look for it in the wrong place.
func impossible(r credential.Record, spec credential.Spec, slots []rotators.VersionID) string {
	if !holds(r) {
		return ""
	}
	const instead = "declare it under a new id, let consumers move, then remove this one"
	switch {
	case r.Spec.Target != spec.Target:
		return fmt.Sprintf("its versions live at target %s, so it cannot change to %s: %s", r.Spec.Target, spec.Target, instead)
	case r.Spec.Kind != spec.Kind:
		return fmt.Sprintf("its versions are of kind %s, so it cannot change to %s: %s", r.Spec.Kind, spec.Kind, instead)
	case r.Spec.Store != spec.Store:
		return fmt.Sprintf("consumers read it in store %s, so it cannot change to %s: %s", r.Spec.Store, spec.Store, instead)
	}
	if slots != nil {
		versions := r.Live()
		versions = append(versions, r.Dead...)
		for _, v := range versions {
			if v.ID != "" && !slices.Contains(slots, v.ID) {
				return fmt.Sprintf("%q is in use and would no longer be one of its versions (%s): keep it declared, or %s", v.ID, joined(slots), instead)
			}
		}
	}
	if plan, err := credential.PlanFor(spec.Traits, spec.AllowGap); err == nil && plan != r.Plan && !settled(r) {
		return fmt.Sprintf("the plan would change from %s to %s in the middle of a rotation (%s): apply again once it is idle", r.Plan, plan, r.Phase)
	}
	return ""
}

func changed(fields []Field) Action {
	if len(fields) == 0 {
		return None
	}
	return Update
}

// differences lists the fields in which two values differ as JSON, by path.
func differences(from, to any) []Field {
	a, b := map[string]string{}, map[string]string{}
	flattened(a, "", plain(from))
	flattened(b, "", plain(to))
	var out []Field
	for _, path := range union(a, b) {
		if a[path] != b[path] {
			out = append(out, Field{Path: path, From: a[path], To: b[path]})
		}
	}
	return out
}

// plain is v as encoding/json would decode it.
func plain(v any) any {
	b, err := json.Marshal(v)
	if err != nil {
		panic("a spec cannot be marshalled: " + err.Error()) // only plain fields and valid JSON: cannot happen
	}
	var out any
	_ = json.Unmarshal(b, &out) // it was marshalled a line above
	return out
}

// flattened writes every leaf under its dotted path. A list is one leaf.
func flattened(into map[string]string, path string, v any) {
	if m, ok := v.(map[string]any); ok && len(m) > 0 {
		for k, child := range m {
			flattened(into, strings.TrimPrefix(path+"."+k, "."), child)
		}
		return
	}
	b, _ := json.Marshal(v) // decoded from JSON above
	into[path] = string(b)
}

func union[K ~string, A, B any](a map[K]A, b map[K]B) []K {
	keys := slices.AppendSeq(slices.Collect(maps.Keys(a)), maps.Keys(b))
	slices.Sort(keys)
	return slices.Compact(keys)
}
