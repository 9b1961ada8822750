package rotatortest_test

import (
	"context"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/rotators"
	"github.com/rekeyhq/rekey/rotators/rotatortest"
)

const credential = "team/conformance"

func minted(cfg rotatortest.MintedConfig) rotatortest.Harness {
	cfg.Credential = credential
	return rotatortest.Harness{Bubble: true, New: func(testing.TB) rotatortest.Subject {
		return mintedSubject(rotatortest.NewFakeMinted(cfg))
	}}
}

func mintedSubject(f *rotatortest.FakeMinted) rotatortest.Subject {
	return rotatortest.Subject{
		Rotator: f, Credential: credential, Open: f.Open,
		Break:      func() func() { f.Cut(); return f.Mend },
		LoseReply:  func() { f.LoseReply("") },
		FailBefore: func() { f.LoseRequest("") },
		Foreign: func() (rotators.VersionID, func() bool) {
			id, m := f.AddForeign()
			return id, func() bool { _, err := f.Open(context.Background(), m); return err == nil }
		},
	}
}

func slots(cfg rotatortest.SlotsConfig) rotatortest.Harness {
	cfg.Credential = credential
	return rotatortest.Harness{Bubble: true, New: func(testing.TB) rotatortest.Subject {
		return slotsSubject(rotatortest.NewFakeSlots(cfg), cfg)
	}}
}

func slotsSubject(f *rotatortest.FakeSlots, cfg rotatortest.SlotsConfig) rotatortest.Subject {
	return rotatortest.Subject{
		Rotator: f, Credential: credential, Open: f.Open,
		Break:      func() func() { f.Cut(); return f.Mend },
		LoseReply:  func() { f.LoseReply("") },
		FailBefore: func() { f.LoseRequest("") },
		Foreign: func() (rotators.VersionID, func() bool) {
			id := rotators.VersionID("a")
			if len(cfg.Slots) > 0 {
				id = cfg.Slots[0]
			}
			f.Put(id, "theirs")
			m := rotators.Text(map[string]string{rotators.FieldUsername: string(id), rotators.FieldPassword: "theirs"})
			return id, func() bool { _, err := f.Open(context.Background(), m); return err == nil }
		},
	}
}

func TestFakeMinted(t *testing.T) {
	t.Run("untagged", func(t *testing.T) { rotatortest.Run(t, minted(rotatortest.MintedConfig{})) })
	t.Run("tagged", func(t *testing.T) { rotatortest.Run(t, minted(rotatortest.MintedConfig{Tagged: true})) })
	t.Run("settling", func(t *testing.T) {
		rotatortest.Run(t, minted(rotatortest.MintedConfig{Tagged: true, Settle: 10 * time.Second, KeepsSessions: true, Limit: 5}))
	})
}

func TestFakeSlots(t *testing.T) {
	t.Run("two", func(t *testing.T) { rotatortest.Run(t, slots(rotatortest.SlotsConfig{})) })
	t.Run("one", func(t *testing.T) {
		rotatortest.Run(t, slots(rotatortest.SlotsConfig{Slots: []rotators.VersionID{"only"}}))
	})
	t.Run("unfenced and settling", func(t *testing.T) {
		rotatortest.Run(t, slots(rotatortest.SlotsConfig{Unfenced: true, Settle: 10 * time.Second}))
	})
}
