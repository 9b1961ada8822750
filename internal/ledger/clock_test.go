package ledger_test

import (
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/ledger"
)

// Machines whose clocks are hours apart agree on the time.
func TestClockFollowsTheServer(t *testing.T) {
	nc := connect(t, startEmbedded(t, t.TempDir()))
	for _, skew := range []time.Duration{0, time.Hour, -24 * time.Hour} {
		l := open(t, ledger.Config{Conn: nc, Now: func() time.Time { return time.Now().Add(skew) }})
		c, err := ledger.NewClock(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		if off := time.Until(c.Now()).Abs(); off > 30*time.Second { // a slow machine may be far off, but not by hours
			t.Errorf("a clock that is off by %s is corrected to %s off", skew, off)
		}
		if got := (c.Offset() + skew).Abs(); got > 30*time.Second {
			t.Errorf("offset %s for a skew of %s", c.Offset(), skew)
		}
	}
}

func TestClockNeedsALedger(t *testing.T) {
	nc := connect(t, startEmbedded(t, t.TempDir()))
	l := open(t, ledger.Config{Conn: nc, Timeout: 200 * time.Millisecond})
	nc.Close()
	if _, err := ledger.NewClock(t.Context(), l); err == nil {
		t.Error("measured without a server")
	}
}
