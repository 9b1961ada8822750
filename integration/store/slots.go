package store

import (
	"errors"
	"fmt"
	"regexp"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

// Slots is everything a store holds of one credential; nil is an empty stage. Its methods are the rules of [Store] as pure
// functions, for stores that can replace all three stages at once: each returns the Slots to make durable, equal to
// the receiver where nothing changes.
type Slots struct{ Current, Pending, Previous *Secret }

// At is the secret of one stage, or a Refused fault around [ErrNotFound].
func (s Slots) At(credential string, stage Stage) (Secret, error) {
	step := fmt.Sprintf("read %s of %s", stage, credential)
	var p *Secret
	switch stage {
	case Current:
		p = s.Current
	case Pending:
		p = s.Pending
	case Previous:
		p = s.Previous
	default:
		return Secret{}, rotators.Faultf(rotators.Refused, step, "unknown stage %q", stage)
	}
	if p == nil {
		return Secret{}, &rotators.Fault{Class: rotators.Refused, Step: step, Err: ErrNotFound}
	}
	return *p, nil
}

// Stage is Store.Stage. The second result is the secret that is held under n's key.
func (s Slots) Stage(n Secret) (Slots, Secret, error) {
	step := "stage " + n.Key.String()
	if err := n.Key.Validate(); err != nil {
		return s, Secret{}, &rotators.Fault{Class: rotators.Refused, Step: step, Err: err}
	}
	if n.Material.Empty() {
		return s, Secret{}, rotators.Faultf(rotators.Refused, step, "the secret has no fields")
	}
	all := []*Secret{s.Pending, s.Current, s.Previous}
	for _, held := range all {
		if held != nil && held.Key.Same(n.Key) {
			return s, *held, nil
		}
	}
	for _, held := range all {
		if held != nil && held.Key.Generation >= n.Key.Generation {
			return s, Secret{}, rotators.Faultf(rotators.Conflict, step, "the store already holds %s", held.Key)
		}
	}
	s.Pending = &n
	return s, n, nil
}

// Promote is Store.Promote.
func (s Slots) Promote(to, from Key) (Slots, error) {
	step := "promote " + to.String()
	err := to.Validate()
	if err == nil && from.Generation != 0 && from.Credential != to.Credential {
		err = fmt.Errorf("it would replace %s, which is another credential", from)
	}
	if err != nil {
		return s, &rotators.Fault{Class: rotators.Refused, Step: step, Err: err}
	}
	conflict := func(format string, args ...any) (Slots, error) {
		return s, rotators.Faultf(rotators.Conflict, step, format, args...)
	}
	switch {
	case s.Current != nil && s.Current.Key.Same(to):
		return s, nil
	case s.Current == nil && from.Generation != 0:
		return conflict("current is empty, not %s", from)
	case s.Current != nil && from.Generation == 0:
		return conflict("current is %s, not empty", s.Current.Key)
	case s.Current != nil && !s.Current.Key.Same(from):
		return conflict("current is %s, not %s", s.Current.Key, from)
	case s.Pending != nil && s.Pending.Key.Same(to):
		return Slots{Current: s.Pending, Previous: s.Current}, nil
	case s.Previous != nil && s.Previous.Key.Same(to):
		return Slots{Current: s.Previous, Previous: s.Current, Pending: s.Pending}, nil
	default:
		return conflict("it is neither pending nor previous")
	}
}

// Discard is Store.Discard.
func (s Slots) Discard(k Key) Slots {
	if s.Pending != nil && s.Pending.Key.Same(k) {
		s.Pending = nil
	}
	return s
}

// Destroy is Store.Destroy.
func (s Slots) Destroy(k Key) Slots {
	if s.Previous != nil && s.Previous.Key.Same(k) {
		s.Previous = nil
	}
	return s
}

// String names the generation and its op, orders/db generation 3 (op 6f1c1f2e), or nothing for generation 0.
func (k Key) String() string {
	if k.Generation == 0 {
		return "nothing"
	}
	return fmt.Sprintf("%s generation %d (op %.8s)", clip(k.Credential), k.Generation, k.OpID)
}

// Validate reports every problem of a key that names one generation.
func (k Key) Validate() error {
	errs := []error{CheckCredential(k.Credential)}
	if k.Generation == 0 {
		errs = append(errs, errors.New("generation 0 names nothing: the first is 1"))
	}
	if k.OpID == uuid.Nil {
		errs = append(errs, errors.New("the op's id is missing"))
	}
	return errors.Join(errs...)
}

var segments = regexp.MustCompile(`^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?/[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$`)

// CheckCredential fails unless id is team/name, and so has no character with a meaning in a path or URL.
func CheckCredential(id string) error {
	if !segments.MatchString(id) {
		return fmt.Errorf("credential id %q: want team/name, each of 1 to 63 characters a-z 0-9 _ - that begins and ends with a letter or digit", clip(id))
	}
	return nil
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
