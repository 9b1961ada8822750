package credential

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/rekeyhq/rekey/rotators"
)

// ID is team/name, each of `[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?`. It never holds a character with a meaning in a
// NATS subject, a path or SQL.
type ID string

// segment is one part of an id, or a target's, store's or consumer's name.
var segment = regexp.MustCompile(`^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$`)

// ParseID checks the form of an id.
func ParseID(s string) (ID, error) {
	team, name, ok := strings.Cut(s, "/")
	if !ok || !segment.MatchString(team) || !segment.MatchString(name) {
		return "", fmt.Errorf("credential id %q: want team/name, each of 1 to 63 characters a-z 0-9 _ - that begins and ends with a letter or digit", clip(s))
	}
	return ID(s), nil
}

// ValidName reports whether s may name a target, a store or a consumer.
func ValidName(s string) bool { return segment.MatchString(s) }

// Token is the id as two NATS subject tokens: team.name.
func (id ID) Token() string { return strings.Replace(string(id), "/", ".", 1) }

// Team is the part before the slash.
func (id ID) Team() string { t, _, _ := strings.Cut(string(id), "/"); return t }

// Name is the part after the slash.
func (id ID) Name() string { _, n, _ := strings.Cut(string(id), "/"); return n }

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// Duration is a time.Duration that is written "90s", "12h" or "30d" (a day is 24 hours).
type Duration time.Duration

// D is d as a time.Duration.
func (d Duration) D() time.Duration { return time.Duration(d) }

// String writes whole days as days and otherwise what time.Duration writes, without trailing zeros: 1h, not 1h0m0s.
func (d Duration) String() string {
	const day = 24 * time.Hour
	if t := time.Duration(d); t != 0 && t%day == 0 {
		return fmt.Sprintf("%dd", t/day)
	}
	s := time.Duration(d).String()
	if m, ok := strings.CutSuffix(s, "m0s"); ok { // 1h30m0s
		s = m + "m"
	}
	if h, ok := strings.CutSuffix(s, "h0m"); ok {
		s = h + "h"
	}
	return s
}

// MarshalText is String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

var days = regexp.MustCompile(`^(\d{1,5})d(.*)$`)

// UnmarshalText reads what time.ParseDuration reads, with an optional leading number of days.
func (d *Duration) UnmarshalText(b []byte) error {
	s := string(b)
	var whole time.Duration
	if m := days.FindStringSubmatch(s); m != nil {
		var n int
		_, _ = fmt.Sscan(m[1], &n)
		whole, s = time.Duration(n)*24*time.Hour, m[2]
		if s == "" {
			s = "0s"
		}
	}
	rest, err := time.ParseDuration(s)
	if err != nil || rest < 0 || whole+rest < whole {
		return fmt.Errorf("duration %q: want a number with a unit, such as 90s, 12h or 30d", clip(string(b)))
	}
	*d = Duration(whole + rest)
	return nil
}

// Spec is what the configuration declares of one credential, with every default filled in. Secrets appear only as references.
type Spec struct {
	Target      string            `json:"target"`
	Kind        string            `json:"kind"` // the target's
	Store       string            `json:"store"`
	Owner       string            `json:"owner"`
	Environment string            `json:"environment"`
	Purpose     string            `json:"purpose"`
	Labels      map[string]string `json:"labels,omitempty"`
	Every       Duration          `json:"every"`               // rotation interval; 0: only on request
	Jitter      Duration          `json:"jitter,omitempty"`    // at most this much later, derived from id and generation
	Overlap     Overlap           `json:"overlap"`             //
	AllowGap    bool              `json:"allow_gap,omitempty"` // in-place plan accepted
	Exclusive   bool              `json:"exclusive,omitempty"` // the target's: nobody else makes versions there
	// StepDeadline bounds one effect, retries included. A claim lasts a third longer.
	StepDeadline Duration        `json:"step_deadline"`
	Consumers    []Consumer      `json:"consumers,omitempty"`
	Adopt        *Adopt          `json:"adopt,omitempty"`
	Fields       json.RawMessage `json:"fields,omitempty"` // the provider's own, as its schema allows
	Traits       rotators.Traits `json:"traits"`           // of the kind, as configured
}

// Overlap is how long old and new both work. Max counts only where a required consumer has not acknowledged.
type Overlap struct {
	Min Duration `json:"min"`
	Max Duration `json:"max"`
}

// Consumer is a declared reader.
type Consumer struct {
	Name string `json:"name"`
	// Required consumers must acknowledge before the old version is retired, or Overlap.Max passes.
	Required bool `json:"required,omitempty"`
}

// Adopt takes an existing credential into the inventory without changing it.
type Adopt struct {
	Version rotators.VersionID `json:"version"`
	// Material names the secret's fields by reference (file: or env:), so that it can be proven and published.
	Material map[string]string `json:"material"`
}

// Target is the issuer instance that holds credentials. Its admin access is by reference, inside Fields.
type Target struct {
	Name         string          `json:"name"`
	Kind         string          `json:"kind"`
	Environment  string          `json:"environment"`
	Owner        string          `json:"owner"`
	Concurrency  int             `json:"concurrency"`   // credentials worked on at once, across all workers
	StepDeadline Duration        `json:"step_deadline"` // bound of one effect
	Exclusive    bool            `json:"exclusive,omitempty"`
	Fields       json.RawMessage `json:"fields,omitempty"`
}

// Limits of a Spec. The least interval keeps a typing mistake from rotating without pause.
const (
	MinEvery            = 2 * time.Second
	DefaultStepDeadline = 30 * time.Second
	MinStepDeadline     = time.Second
)

// PlanFor chooses the plan that the traits allow: minted if the issuer picks the bytes, overlap if it holds two, else
// in-place, which the credential has to accept.
func PlanFor(t rotators.Traits, allowGap bool) (Plan, error) {
	switch {
	case t.MaxLive < 1:
		return "", errors.New("the kind's traits are invalid: MaxLive is below 1")
	case t.Minted:
		return Minted, nil
	case t.MaxLive >= 2:
		return Overlapping, nil
	case allowGap:
		return InPlace, nil
	default:
		return "", errors.New("the issuer holds one version at a time, so each rotation has a moment in which no stored secret works: say allow_gap: true to accept that, or give it a second slot")
	}
}

var reference = regexp.MustCompile(`^(file:.+|env:[A-Za-z_][A-Za-z0-9_]*)$`)

// IsReference reports whether s has the form of a reference to a secret: file:/path or env:NAME. Anything else may be a secret
// and must not be kept or shown.
func IsReference(s string) bool { return reference.MatchString(s) }

// Validate returns every problem of s, joined. It does not look at what the provider's fields mean.
func (s Spec) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, f := range []struct{ name, value string }{{"target", s.Target}, {"store", s.Store}} {
		if !ValidName(f.value) {
			bad("%s %q: want 1 to 63 characters a-z 0-9 _ -", f.name, clip(f.value))
		}
	}
	for _, f := range []struct{ name, value string }{{"owner", s.Owner}, {"environment", s.Environment}, {"purpose", s.Purpose}} { // invariant 11
		if strings.TrimSpace(f.value) == "" {
			bad("%s: missing; every credential has one", f.name)
		}
	}
	if s.Every != 0 && s.Every.D() < MinEvery {
		bad("every %s: the least interval is %s", s.Every, MinEvery)
	}
	if s.Every != 0 && s.Overlap.Min >= s.Every {
		bad("overlap.min %s: must be shorter than every %s, or the overlap would never end before the next rotation", s.Overlap.Min, s.Every)
	}
	if s.Overlap.Max < s.Overlap.Min {
		bad("overlap.max %s: shorter than overlap.min %s", s.Overlap.Max, s.Overlap.Min)
	}
	if s.StepDeadline.D() < MinStepDeadline {
		bad("step_deadline %s: the least is %s", s.StepDeadline, MinStepDeadline)
	}
	seen := map[string]bool{}
	for _, c := range s.Consumers {
		if !ValidName(c.Name) || seen[c.Name] {
			bad("consumer %q: want a unique name of a-z 0-9 _ -", clip(c.Name))
		}
		seen[c.Name] = true
	}
	if s.Adopt != nil {
		if s.Adopt.Version == "" || len(s.Adopt.Material) == 0 {
			bad("adopt: wants the version's id and references to its secret")
		}
		for name, ref := range s.Adopt.Material {
			if !IsReference(ref) { // perhaps the secret itself: it must not be shown
				bad("adopt.material.%s: want a reference, file:/path or env:NAME, never the secret itself", clip(name))
			}
		}
	}
	if _, err := PlanFor(s.Traits, s.AllowGap); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
