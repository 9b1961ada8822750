package workers_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators/rotatortest"
)

// Losing the work stream loses nothing: lanes that are gone are made again, and a kill gets through.
func TestLostLanesAreMadeAgain(t *testing.T) {
	k := kinds()[0]
	inBubble(t, k, func(w *world) {
		settled(w, k)
		w.setStrict(false)
		w.must(w.ledger.RemoveLanes(context.Background(), "db"))
		time.Sleep(time.Minute)
		w.request(credential.Kill)
		w.until("killed", func(r credential.Record) bool { return r.Phase == credential.Suspended })
	})
}

// An emergency that comes while the issuer is minting: what it made is removed, although nobody may take the outcome any more.
func TestKillDuringAMint(t *testing.T) {
	untagged := kindOf{"minted-shared", credential.Minted, func() issuer {
		return rotatortest.NewFakeMinted(rotatortest.MintedConfig{Credential: string(id), Seed: "s"})
	}, false}
	inBubble(t, untagged, func(w *world) {
		settled(w, untagged)
		w.setStrict(false)
		armed := true
		w.issuer.(*rotatortest.FakeMinted).After = func(_ context.Context, c rotatortest.Call) error {
			if armed && c.Method == rotatortest.Apply {
				armed = false
				w.request(credential.Kill)
				w.until("ordered", func(r credential.Record) bool { return r.Epoch == 1 })
			}
			return nil
		}
		w.request(credential.Rotate)
		w.until("killed and swept", func(r credential.Record) bool { return atRest(credential.Suspended)(r) && r.Swept })
		for _, v := range w.issuer.Census() {
			if v.Enabled {
				t.Errorf("%s lives after the kill", v.ID)
			}
		}
		w.audit()
	})
}

// The same, and the worker dies with what it knows: the kill must not claim to be proven.
func TestKillDuringAMintWhoseWorkerDies(t *testing.T) {
	untagged := kindOf{"minted-shared", credential.Minted, func() issuer {
		return rotatortest.NewFakeMinted(rotatortest.MintedConfig{Credential: string(id), Seed: "s"})
	}, false}
	inBubble(t, untagged, func(w *world) {
		settled(w, untagged)
		w.setStrict(false)
		w.faults.arm(0, none)
		w.faults.match = "apply"
		w.faults.what = dieAfter
		w.request(credential.Rotate)
		w.until("minting", func(r credential.Record) bool { return r.Phase == credential.Minting })
		w.request(credential.Kill)
		r := w.until("killed", func(r credential.Record) bool { return r.Phase == credential.Suspended })
		if r.Proven || !strings.Contains(r.Residue, "mint was under way") {
			t.Errorf("proven %v, residue %q, census %+v", r.Proven, r.Residue, w.issuer.Census())
		}
	})
}
