package events

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Stream is the stream that holds the events, on subjects rekey.event.<type>.<team>.<name>.
const Stream = "REKEY_EVENTS"

// Filter selects events: those of any listed credential or team, that are of any listed type. The zero value is every event.
type Filter struct {
	Credentials []string // ids, team/name
	Teams       []string
	Types       []string // such as Rotated, or its short name, rotated
}

// Validate returns every problem of f, joined.
func (f Filter) Validate() error {
	var errs []error
	for _, id := range f.Credentials {
		if !validID(id) {
			errs = append(errs, fmt.Errorf("credential %q: want team/name of characters a-z 0-9 _ -", id))
		}
	}
	for _, team := range f.Teams {
		if !segment.MatchString(team) {
			errs = append(errs, fmt.Errorf("team %q: want characters a-z 0-9 _ -", team))
		}
	}
	for _, t := range f.Types {
		if !slices.ContainsFunc(Types(), func(known string) bool { return t == known || t == Short(known) }) {
			errs = append(errs, fmt.Errorf("event type %q: want one of %s", t, shortTypes()))
		}
	}
	return errors.Join(errs...)
}

func shortTypes() string {
	var s []string
	for _, t := range Types() {
		s = append(s, Short(t))
	}
	return strings.Join(s, ", ")
}

// subjects lists what to subscribe to; no two of them overlap, as a consumer may not have that.
func (f Filter) subjects() []string {
	var who [][2]string
	for _, team := range f.Teams {
		who = append(who, [2]string{team, ""})
	}
	for _, id := range f.Credentials {
		team, name, _ := strings.Cut(id, "/")
		if !slices.Contains(f.Teams, team) {
			who = append(who, [2]string{team, name})
		}
	}
	if len(who) == 0 {
		who = [][2]string{{}}
	}
	types := f.Types
	if len(types) == 0 {
		types = []string{""}
	}
	var all []string
	for _, t := range types {
		for _, w := range who {
			all = append(all, SubjectFor(t, w[0], w[1]))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Since is a position in the event stream. At most one field is set.
type Since struct {
	Sequence uint64    // the first event to deliver, as in Event.Sequence
	Time     time.Time // events published at this instant or later
}

func (s Since) validate() error {
	if s.Sequence != 0 && !s.Time.IsZero() {
		return errors.New("since: a sequence and a time are set, want one of them")
	}
	return nil
}

// policy translates s; otherwise is for the zero value.
func (s Since) policy(otherwise jetstream.DeliverPolicy) (jetstream.DeliverPolicy, uint64, *time.Time) {
	switch {
	case s.Sequence != 0:
		return jetstream.DeliverByStartSequencePolicy, s.Sequence, nil
	case !s.Time.IsZero():
		return jetstream.DeliverByStartTimePolicy, 0, &s.Time
	default:
		return otherwise, 0, nil
	}
}
