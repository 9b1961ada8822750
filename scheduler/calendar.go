package scheduler

import (
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
)

// NextInstant is when r's next rotation is due by its calendar, and zero if it has none. It is pure: every scheduler computes
// the same instant from the same record. A first generation is due at once.
//
// The calendar is the interval with derived jitter. Cron, windows, blackout dates and max age belong here too, each as a
// function from an instant to the next allowed one, and nowhere else.
func NextInstant(r credential.Record, now time.Time) time.Time {
	s := r.Spec
	switch {
	case r.Generation == 0:
		return now
	case s.Every == 0:
		return time.Time{}
	case r.LastRotation.IsZero(): // generations were tried and none was promoted
		return now
	}
	return r.LastRotation.Add(s.Every.D() + credential.Spread(r.ID, r.Generation, s.Jitter.D()))
}

// Catchup is when overdue work may begin after an outage: due instants that passed more than after ago are spread over window,
// by derivation, so that a fleet does not fire at once and every scheduler agrees. It is zero if r may begin now.
func Catchup(r credential.Record, now time.Time, after, window time.Duration) time.Time {
	if now.Sub(r.NextRotation) <= after {
		return time.Time{}
	}
	return now.Add(credential.Spread(r.ID, r.Generation, window))
}
