package api

import (
	"fmt"
	"slices"
	"strings"
)

// Scope is one thing that an identity may do.
type Scope string

// The scopes. None implies another.
const (
	ScopeRead      Scope = "read"      // see credentials, targets, incidents, events and audit entries
	ScopeRotate    Scope = "rotate"    // rotate now
	ScopeOperate   Scope = "operate"   // hold, rollback, pause, resume, restore
	ScopeEmergency Scope = "emergency" // kill, replace
	ScopeApply     Scope = "apply"     // change what is declared
	ScopeAdmin     Scope = "admin"     // identities
	ScopeMetrics   Scope = "metrics"   // scrape /metrics
)

// Scopes lists every scope.
func Scopes() []Scope {
	return []Scope{ScopeRead, ScopeRotate, ScopeOperate, ScopeEmergency, ScopeApply, ScopeAdmin, ScopeMetrics}
}

func joined[S ~string](list []S) string {
	words := make([]string, len(list))
	for i, s := range list {
		words[i] = string(s)
	}
	return strings.Join(words, ", ")
}

// allows reports whether the identity sees the team.
func (i Identity) allows(team string) bool {
	return len(i.Teams) == 0 || slices.Contains(i.Teams, team)
}

func (i Identity) has(s Scope) bool { return slices.Contains(i.Scopes, s) }

// problems returns everything that keeps i from being an identity.
func (i Identity) problems() []string {
	var bad []string
	if !validName(i.Name) || slices.Contains(reserved(), i.Name) {
		bad = append(bad, fmt.Sprintf("name %q: want 1 to 63 characters a-z 0-9 _ - that begins and ends with a letter or digit, and none of %s", clip(i.Name), joined(reserved())))
	}
	if len(i.Scopes) == 0 {
		bad = append(bad, "scopes: missing; choose among "+joined(Scopes()))
	}
	for _, s := range i.Scopes {
		if !slices.Contains(Scopes(), s) {
			bad = append(bad, fmt.Sprintf("scope %q: choose among %s", clip(string(s)), joined(Scopes())))
		}
	}
	for _, t := range i.Teams {
		if !validName(t) {
			bad = append(bad, fmt.Sprintf("team %q: want the part of a credential's id before the slash", clip(t)))
		}
	}
	if i.has(ScopeAdmin) && len(i.Teams) > 0 {
		bad = append(bad, "an identity with the scope admin is not limited to teams: it could give itself any other")
	}
	if b, ok := hexHash(i.TokenSHA256); !ok || len(b) != 32 {
		bad = append(bad, "token_sha256: want the 64 hexadecimal digits of a SHA-256")
	}
	return bad
}

// reserved names would look like the engine's own in an audit entry.
func reserved() []string { return []string{"scheduler", "worker", "rekey", "engine", "consumer"} }
