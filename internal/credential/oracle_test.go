package credential

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/rotators"
)

// healthy is an observation of a credential in its overlap, a by then retired one before it, with its whole history.
func healthy(t *testing.T) Observation {
	t.Helper()
	d := drive(t, Overlapping)
	var entries []Entry
	var seen []Seen
	record := func() {
		if n := len(entries); n > 0 && entries[n-1].Rev == d.r.Rev {
			return
		}
		entries = append(entries, d.r.Entry)
		for _, n := range d.r.Announce {
			seen = append(seen, Seen{d.r.ID, n.Type, d.r.Rev, fmt.Sprint(d.r.Rev, n.Type)})
		}
	}
	record()
	step := func(in Input) { d.feed(in); record() }
	done := func(res Result, id rotators.VersionID) {
		step(Outcome{Worker: "w", Phase: d.r.Phase, Result: res, Version: id})
	}
	rotate := func(id rotators.VersionID) {
		step(Request{Verb: Rotate})
		step(Tick{Worker: "w"})
		done(Done, id)
		done(Done, id)
		done(Accepted, id)
		done(Done, id)
	}
	rotate("a")
	rotate("b")
	d.now = d.r.DrainMin
	step(Tick{Worker: "w"})
	done(Done, "a")
	done(Rejected, "a")
	done(Done, "a")
	done(Done, "a")
	d.want(Idle)
	rotate("a")
	d.want(Draining)
	return Observation{
		Now: d.now, Records: []Record{d.r}, Entries: entries, Events: seen,
		Census: map[ID][]rotators.VersionInfo{d.r.ID: {
			{ID: "a", Ours: true, Enabled: true, Generation: 3}, {ID: "b", Ours: true, Enabled: true, Generation: 2},
			{ID: "stranger", Enabled: true},
		}},
		Stored: map[ID]map[string]Published{d.r.ID: {"current": d.r.Published, "previous": d.r.Previous}},
		Verdicts: map[ID]map[string]rotators.Verdict{d.r.ID: {
			"current": rotators.Accepted, "previous": rotators.Accepted,
		}},
	}
}

func TestAuditFindsNothingInAHealthySystem(t *testing.T) {
	for _, v := range Audit(healthy(t)) {
		t.Error(v)
	}
}

// Each row breaks one thing; the oracle must name the invariant.
func TestAuditFindsEachViolation(t *testing.T) {
	const id = ID("shop/orders")
	tests := []struct {
		name      string
		invariant int
		breaks    func(*Observation)
	}{
		{"store behind the record", 1, func(o *Observation) { o.Stored[id]["current"] = o.Stored[id]["previous"] }},
		{"consumers read a dead version", 1, func(o *Observation) { o.Census[id][0].Enabled = false }},
		{"current refused", 1, func(o *Observation) { o.Verdicts[id]["current"] = rotators.Rejected }},
		{"applied before it was stored", 2, func(o *Observation) {
			o.Records[0].Phase = Applying
			o.Records[0].Candidate = &Version{Generation: 4}
		}},
		{"too many live", 3, func(o *Observation) {
			o.Census[id] = append(o.Census[id], rotators.VersionInfo{ID: "c", Ours: true, Enabled: true})
		}},
		{"orphan live", 4, func(o *Observation) { o.Records[0].Phase, o.Records[0].Old = Idle, nil }},
		{"old gone inside the overlap", 4, func(o *Observation) { o.Census[id][1].Enabled = false }},
		{"previous left behind", 4, func(o *Observation) { o.Records[0].Phase = Idle }},
		{"event missing", 5, func(o *Observation) { o.Events = o.Events[1:] }},
		{"event of nothing", 5, func(o *Observation) { o.Events = append(o.Events, Seen{id, NoticeRevoked, 2, "x"}) }},
		{"event under two ids", 5, func(o *Observation) {
			e := o.Events[0]
			e.ID = "other"
			o.Events = append(o.Events, e)
		}},
		{"alive after a kill", 6, func(o *Observation) {
			o.Records[0].Phase, o.Records[0].Swept = Suspended, true
			o.Records[0].Current, o.Records[0].Old = nil, nil
		}},
		{"stored secret works after a kill", 6, func(o *Observation) { o.Records[0].Phase = Suspended }},
		{"old refused inside the overlap", 8, func(o *Observation) { o.Verdicts[id]["previous"] = rotators.Rejected }},
		{"retired early", 8, func(o *Observation) {
			i := slices.IndexFunc(o.Entries, func(e Entry) bool { return e.From == Draining && e.To == Disabling })
			o.Entries[i].At = o.Entries[i].At.Add(-time.Second)
		}},
		{"audit entry edited", 10, func(o *Observation) { o.Entries[2].Actor = "nobody" }},
		{"audit entry dropped", 10, func(o *Observation) { o.Entries = slices.Delete(o.Entries, 3, 4) }},
		{"audit tail dropped", 10, func(o *Observation) { o.Entries = o.Entries[:len(o.Entries)-1] }},
		{"audit entry replaced", 10, func(o *Observation) {
			o.Entries[3].Detail = "another story"
			o.Entries[3].Hash = o.Entries[3].Sum()
		}},
		{"no owner", 11, func(o *Observation) { o.Records[0].Spec.Owner = "" }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := healthy(t)
			tt.breaks(&o)
			found := Audit(o)
			if !slices.ContainsFunc(found, func(v Violation) bool { return v.Invariant == tt.invariant && v.Credential == id }) {
				t.Errorf("invariant %d not named; found %v", tt.invariant, found)
			}
		})
	}
}

func TestIDs(t *testing.T) {
	for _, ok := range []string{"a/b", "shop/orders-db", "t1/x_y"} {
		if _, err := ParseID(ok); err != nil {
			t.Errorf("%s: %v", ok, err)
		}
	}
	long := make([]byte, 300)
	for i := range long {
		long[i] = 'a'
	}
	for _, bad := range []string{"", "a", "a/", "/b", "a/b/c", "a.b/c", "a/*", "a/>", "A/b", "a/b ", "a/-b", "a/b-", "a/b\n", string(long) + "/b"} {
		if _, err := ParseID(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		} else if len(err.Error()) > 300 {
			t.Errorf("the error repeats %d bytes of input", len(err.Error()))
		}
	}
}

func TestDurations(t *testing.T) {
	for in, want := range map[string]time.Duration{"90s": 90 * time.Second, "1d": 24 * time.Hour, "30d12h": 732 * time.Hour, "0s": 0} {
		var d Duration
		if err := d.UnmarshalText([]byte(in)); err != nil || d.D() != want {
			t.Errorf("%s: %s, %v", in, d, err)
		}
		var back Duration
		if err := back.UnmarshalText([]byte(d.String())); err != nil || back != d {
			t.Errorf("%s is written %s, which reads %s, %v", in, d, back, err)
		}
	}
	for _, in := range []string{"", "5", "-1s", "1w", "d", "999999d", "d5s"} {
		var d Duration
		if err := d.UnmarshalText([]byte(in)); err == nil {
			t.Errorf("%q was read as %s", in, d)
		}
	}
}
