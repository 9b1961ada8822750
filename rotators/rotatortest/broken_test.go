package rotatortest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/rekeyhq/rekey/rotators"
	"github.com/rekeyhq/rekey/rotators/rotatortest"
)

// Each of these wraps a sound rotator and breaks one promise.

// naive answers Accepted without asking, as a server that trusts everybody would.
type naive struct{ *rotatortest.FakeSlots }

func (naive) Prove(ctx context.Context, _ rotators.Op, _ rotators.VersionID, _ rotators.Material) (rotators.Verdict, error) {
	if err := ctx.Err(); err != nil {
		return rotators.Unknown, rotators.Faultf(rotators.Transient, "prove", "%w", err)
	}
	return rotators.Accepted, nil
}

// gloomy takes an unreachable issuer for a refusal.
type gloomy struct{ *rotatortest.FakeSlots }

func (g gloomy) Prove(ctx context.Context, op rotators.Op, id rotators.VersionID, m rotators.Material) (rotators.Verdict, error) {
	v, err := g.FakeSlots.Prove(ctx, op, id, m)
	if err != nil {
		return rotators.Rejected, nil
	}
	return v, nil
}

// forgetful stages the next secret in the first slot, whatever is in use.
type forgetful struct{ *rotatortest.FakeSlots }

func (f forgetful) Compose(op rotators.Op, _ []rotators.VersionID, r io.Reader) (rotators.VersionID, rotators.Material, error) {
	return f.FakeSlots.Compose(op, nil, r)
}

// weak draws four bytes.
type weak struct{ *rotatortest.FakeSlots }

func (f weak) Compose(op rotators.Op, inUse []rotators.VersionID, r io.Reader) (rotators.VersionID, rotators.Material, error) {
	id, m, err := f.FakeSlots.Compose(op, inUse, r)
	fields := m.RevealAll()
	if pw := fields[rotators.FieldPassword]; len(pw) > 8 {
		fields[rotators.FieldPassword] = pw[len(pw)-8:]
	}
	return id, rotators.NewMaterial(fields), err
}

// talkative names the secret in its errors.
type talkative struct{ *rotatortest.FakeSlots }

func (f talkative) Apply(ctx context.Context, op rotators.Op, m rotators.Material) (rotators.Version, error) {
	v, err := f.FakeSlots.Apply(ctx, op, m)
	if err != nil {
		err = &rotators.Fault{Class: rotators.ClassOf(err), Step: "apply", Err: fmt.Errorf("SQL %x: %w", m.Reveal(rotators.FieldPassword), err)}
	}
	return v, err
}

// bold calls a lost reply a failure without effect.
type bold struct{ *rotatortest.FakeSlots }

func (f bold) Apply(ctx context.Context, op rotators.Op, m rotators.Material) (rotators.Version, error) {
	v, err := f.FakeSlots.Apply(ctx, op, m)
	if err != nil && rotators.ClassOf(err) == rotators.Unsure {
		err = rotators.Faultf(rotators.Transient, "apply", "timeout")
	}
	return v, err
}

// unfenced says that it holds a fence.
type unfenced struct{ *rotatortest.FakeSlots }

func (f unfenced) Traits() rotators.Traits {
	t := f.FakeSlots.Traits()
	t.Unfenced = false
	return t
}

// lingering says that Disable ends sessions.
type lingering struct{ *rotatortest.FakeSlots }

func (f lingering) Traits() rotators.Traits {
	t := f.FakeSlots.Traits()
	t.Kills = true
	return t
}

// fleeting refuses to disable what is disabled.
type fleeting struct{ *rotatortest.FakeSlots }

func (f fleeting) Disable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	for _, i := range f.Census() {
		if i.ID == id && !i.Enabled {
			return rotators.Faultf(rotators.Refused, "disable", "already disabled")
		}
	}
	return f.FakeSlots.Disable(ctx, op, id)
}

// halfBlind leaves disabled and second versions out of its census.
type halfBlind struct{ *rotatortest.FakeSlots }

func (f halfBlind) Inspect(ctx context.Context) ([]rotators.VersionInfo, error) {
	all, err := f.FakeSlots.Inspect(ctx)
	return all[:min(1, len(all))], err
}

// cruel ends every session of the credential.
type cruel struct{ *rotatortest.FakeSlots }

func (f cruel) Disable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	err := f.FakeSlots.Disable(ctx, op, id)
	if err != nil {
		return err
	}
	for _, i := range f.Census() {
		if i.Enabled && i.ID != id { // off and on again: whoever was logged in is not any more
			_ = f.FakeSlots.Disable(ctx, op, i.ID)
			next := op
			next.Epoch++
			_ = f.Enable(ctx, next, i.ID)
		}
	}
	return nil
}

// greedy promises one live version more than it holds.
type greedy struct{ *rotatortest.FakeMinted }

func (f greedy) Traits() rotators.Traits {
	t := f.FakeMinted.Traits()
	t.MaxLive++
	return t
}

// doubling mints again for the same op.
type doubling struct{ *rotatortest.FakeMinted }

func (f doubling) Apply(ctx context.Context, op rotators.Op, m rotators.Material) (rotators.Version, error) {
	v, err := f.FakeMinted.Apply(ctx, op, m)
	if err != nil && rotators.ClassOf(err) == rotators.Unsure && !errors.Is(err, context.Canceled) {
		other := op
		other.ID[0]++
		return f.FakeMinted.Apply(ctx, other, m)
	}
	return v, err
}

// tidy deletes a foreign version to make room.
type tidy struct{ *rotatortest.FakeSlots }

func (f tidy) Disable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	err := f.FakeSlots.Disable(ctx, op, id)
	if err != nil && rotators.ClassOf(err) == rotators.Refused {
		return nil
	}
	return err
}

// plainErrors returns errors that carry no class.
type plainErrors struct{ *rotatortest.FakeSlots }

func (f plainErrors) Disable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	if err := f.FakeSlots.Disable(ctx, op, id); err != nil {
		return errors.New(err.Error())
	}
	return nil
}

// impatient has a trait that cannot be.
type impatient struct{ *rotatortest.FakeSlots }

func (f impatient) Traits() rotators.Traits {
	t := f.FakeSlots.Traits()
	t.Settle = -1
	return t
}

// lazy says that it applied.
type lazy struct{ *rotatortest.FakeSlots }

func (lazy) Apply(_ context.Context, _ rotators.Op, m rotators.Material) (rotators.Version, error) {
	return rotators.Version{ID: rotators.VersionID(m.Reveal(rotators.FieldUsername))}, nil
}

// jealous applies an op once only.
type jealous struct{ *rotatortest.FakeSlots }

func (f jealous) Apply(ctx context.Context, op rotators.Op, m rotators.Material) (rotators.Version, error) {
	for _, i := range f.Census() {
		if i.OpID == op.ID {
			return rotators.Version{}, rotators.Faultf(rotators.Conflict, "apply", "done before")
		}
	}
	return f.FakeSlots.Apply(ctx, op, m)
}

// stuck answers every mint with the first one.
type stuck struct {
	*rotatortest.FakeMinted
	first *rotators.Version
}

func (f stuck) Apply(ctx context.Context, op rotators.Op, m rotators.Material) (rotators.Version, error) {
	v, err := f.FakeMinted.Apply(ctx, op, m)
	if err == nil && f.first.ID == "" {
		*f.first = v
	}
	return *f.first, err
}

// alarmist always has something to complain about.
type alarmist struct{ *rotatortest.FakeSlots }

func (alarmist) Check(context.Context) ([]rotators.Finding, error) {
	return []rotators.Finding{{Message: "woe", Fatal: true}}, nil
}

// TestSuiteFindsTheBroken is the suite's own test: each broken rotator fails the named check, and each check is failed by one.
func TestSuiteFindsTheBroken(t *testing.T) {
	two := rotatortest.SlotsConfig{}
	onSlots := func(cfg rotatortest.SlotsConfig, wrap func(*rotatortest.FakeSlots) rotators.Rotator) rotatortest.Harness {
		cfg.Credential = credential
		return rotatortest.Harness{Bubble: true, New: func(testing.TB) rotatortest.Subject {
			f := rotatortest.NewFakeSlots(cfg)
			s := slotsSubject(f, cfg)
			s.Rotator = wrap(f)
			return s
		}}
	}
	onMinted := func(cfg rotatortest.MintedConfig, wrap func(*rotatortest.FakeMinted) rotators.Rotator) rotatortest.Harness {
		cfg.Credential = credential
		return rotatortest.Harness{Bubble: true, New: func(testing.TB) rotatortest.Subject {
			f := rotatortest.NewFakeMinted(cfg)
			s := mintedSubject(f)
			s.Rotator = wrap(f)
			return s
		}}
	}
	everFailed := map[string]bool{}
	for _, broken := range []struct {
		name, check string
		harness     rotatortest.Harness
	}{
		{"accepts everything", "a wrong secret is rejected", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return naive{f} })},
		{"takes unreachable for rejected", "an unreachable issuer is unknown", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return gloomy{f} })},
		{"takes cancelled for rejected", "a cancelled call is no verdict", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return gloomy{f} })},
		{"composes into a slot in use", "compose avoids what is in use", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return forgetful{f} })},
		{"overwrites the live slot", "MaxLive versions work at once", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return forgetful{f} })},
		{"draws short secrets", "compose draws a strong secret", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return weak{f} })},
		{"leaks a secret as hex", "an older op changes nothing", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return talkative{f} })},
		{"calls a lost reply transient", "a lost reply is unsure", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return bold{f} })},
		{"has no fence for old ops", "an older op changes nothing", onSlots(rotatortest.SlotsConfig{Unfenced: true}, func(f *rotatortest.FakeSlots) rotators.Rotator { return unfenced{f} })},
		{"has no fence for old epochs", "an older epoch changes nothing", onSlots(rotatortest.SlotsConfig{Unfenced: true}, func(f *rotatortest.FakeSlots) rotators.Rotator { return unfenced{f} })},
		{"lets a frozen apply undo a kill", "a kill reaches a slot not yet applied", onSlots(rotatortest.SlotsConfig{Unfenced: true}, func(f *rotatortest.FakeSlots) rotators.Rotator { return unfenced{f} })},
		{"applies what it disabled", "an op that disabled does not apply again", onSlots(rotatortest.SlotsConfig{Unfenced: true}, func(f *rotatortest.FakeSlots) rotators.Rotator { return unfenced{f} })},
		{"enables what it disabled", "an op that disabled does not enable", onSlots(rotatortest.SlotsConfig{Unfenced: true}, func(f *rotatortest.FakeSlots) rotators.Rotator { return unfenced{f} })},
		{"leaves sessions", "disable ends sessions", onSlots(rotatortest.SlotsConfig{KeepsSessions: true}, func(f *rotatortest.FakeSlots) rotators.Rotator { return lingering{f} })},
		{"ends every session", "disable ends only its own sessions", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return cruel{f} })},
		{"cannot disable twice", "disable and delete repeat", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return fleeting{f} })},
		{"hides versions", "inspect is complete", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return halfBlind{f} })},
		{"says nil about a foreign version", "a foreign version is left alone", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return tidy{f} })},
		{"returns errors without class", "an unreachable issuer is unknown", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return plainErrors{f} })},
		{"promises too many", "MaxLive versions work at once", onMinted(rotatortest.MintedConfig{}, func(f *rotatortest.FakeMinted) rotators.Rotator { return greedy{f} })},
		{"has an impossible trait", "traits are possible", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return impatient{f} })},
		{"does nothing", "an applied version can log in", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return lazy{f} })},
		{"cannot repeat", "apply repeats", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return jealous{f} })},
		{"keeps sessions of a replaced secret", "one slot replaces at once", onSlots(rotatortest.SlotsConfig{Slots: []rotators.VersionID{"only"}, KeepsSessions: true},
			func(f *rotatortest.FakeSlots) rotators.Rotator { return lingering{f} })},
		{"finds what is not there", "check finds nothing fatal", onSlots(two, func(f *rotatortest.FakeSlots) rotators.Rotator { return alarmist{f} })},
		{"mints the same twice", "two mints differ", onMinted(rotatortest.MintedConfig{}, func(f *rotatortest.FakeMinted) rotators.Rotator {
			return stuck{f, new(rotators.Version)}
		})},
		{"mints twice for one op", "a mint does not repeat", onMinted(rotatortest.MintedConfig{Tagged: true}, func(f *rotatortest.FakeMinted) rotators.Rotator { return doubling{f} })},
	} {
		t.Run(broken.name, func(t *testing.T) {
			failed := rotatortest.Failures(t, broken.harness)
			for name := range failed {
				everFailed[name] = true
			}
			if failed[broken.check] == nil {
				names := []string{}
				for name := range failed {
					names = append(names, name)
				}
				slices.Sort(names)
				t.Errorf("%q passed; failed are %q", broken.check, names)
			}
			t.Logf("killed: %v", failed[broken.check])
		})
	}
	for _, c := range rotatortest.Checks() {
		if !everFailed[c.Name] {
			t.Errorf("no broken rotator fails %q, so nobody knows whether it can fail", c.Name)
		}
	}
}
