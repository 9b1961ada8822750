package rotatortest

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

// trial is one run of one check. Its methods fail the check by panicking with failure.
type trial struct {
	Subject
	ctx         context.Context
	traits      rotators.Traits
	incarnation uuid.UUID

	mu       sync.Mutex
	errs     []error
	secrets  [][]byte
	sessions []Session
}

func (x *trial) fail(format string, args ...any) {
	panic(failure{fmt.Sprintf(format, args...)})
}

// op is the op of one generation at one epoch. Its id does not depend on the epoch.
func (x *trial) op(epoch, generation uint64) rotators.Op {
	return rotators.Op{ID: rotators.NewOpID(x.incarnation, x.Credential, generation), Credential: x.Credential, Generation: generation, Epoch: epoch}
}

// noted remembers an error, to be searched for secrets, and wants it to be a *rotators.Fault.
func (x *trial) noted(err error) error {
	if err == nil {
		return nil
	}
	x.mu.Lock()
	x.errs = append(x.errs, err)
	x.mu.Unlock()
	if f := new(rotators.Fault); !errors.As(err, &f) {
		x.fail("an error that is no *rotators.Fault: %T: %v", err, err)
	}
	return err
}

// secretFields are those whose bytes must not show up anywhere.
func secretFields(m rotators.Material) []string {
	public := []string{rotators.FieldUsername, rotators.FieldAccessKeyID, "host", "port", "database"}
	return slices.DeleteFunc(m.Names(), func(n string) bool { return slices.Contains(public, n) })
}

func (x *trial) remember(m rotators.Material) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, name := range secretFields(m) {
		x.secrets = append(x.secrets, m.Reveal(name))
	}
}

// made is one version and its secret.
type made struct {
	id rotators.VersionID
	m  rotators.Material
	op rotators.Op
}

func ids(in []made) []rotators.VersionID {
	out := make([]rotators.VersionID, len(in))
	for i, v := range in {
		out[i] = v.id
	}
	return out
}

// compose draws a secret for the next slot. For a minted kind it gives nothing.
func (x *trial) compose(op rotators.Op, inUse ...made) made {
	if x.traits.Minted {
		return made{op: op}
	}
	c, ok := x.Rotator.(rotators.Composer)
	if !ok {
		x.fail("its traits do not say Minted, and it is no Composer")
	}
	id, m, err := c.Compose(op, ids(inUse), rand.Reader)
	if x.noted(err) != nil {
		x.fail("compose: %v", err)
	}
	x.remember(m)
	return made{id, m, op}
}

// apply composes (or mints) and applies, and wants success.
func (x *trial) apply(op rotators.Op, inUse ...made) made {
	v := x.compose(op, inUse...)
	return x.applied(v)
}

func (x *trial) applied(v made) made {
	got, err := x.Rotator.Apply(x.ctx, v.op, v.m)
	if x.noted(err) != nil {
		x.fail("apply generation %d: %v", v.op.Generation, err)
	}
	if x.traits.Minted {
		if got.ID == "" || got.Material.Empty() {
			x.fail("apply generation %d minted an id %q and %d fields", v.op.Generation, got.ID, len(got.Material.Names()))
		}
		v.id, v.m = got.ID, got.Material
		x.remember(v.m)
	} else if got.ID != v.id {
		x.fail("apply generation %d wrote version %q, and Compose had named %q", v.op.Generation, got.ID, v.id)
	}
	return v
}

// verdict asks once.
func (x *trial) verdict(r rotators.Rotator, v made) rotators.Verdict {
	got, err := r.Prove(x.ctx, v.op, v.id, v.m)
	_ = x.noted(err)
	if (got == rotators.Unknown) != (err != nil) {
		x.fail("the verdict on %q is %s with error %v: Unknown wants one, the others none", v.id, got, err)
	}
	return got
}

// accepted wants the login to work, within the time that the issuer says it may take.
func (x *trial) accepted(what string, vs ...made) {
	for _, v := range vs {
		got := x.verdict(x.Rotator, v)
		for began := time.Now(); got != rotators.Accepted && time.Since(began) < x.traits.Settle; got = x.verdict(x.Rotator, v) {
			time.Sleep(max(x.traits.Settle/20, time.Millisecond))
		}
		if got != rotators.Accepted {
			x.fail("%s: the login with generation %d in %q is %s, want accepted", what, v.op.Generation, v.id, got)
		}
	}
}

func (x *trial) rejected(what string, vs ...made) {
	for _, v := range vs {
		if got := x.verdict(x.Again, v); got != rotators.Rejected {
			x.fail("%s: the login with generation %d in %q is %s, want rejected", what, v.op.Generation, v.id, got)
		}
	}
}

func (x *trial) ok(what string, err error) {
	if x.noted(err) != nil {
		x.fail("%s: %v", what, err)
	}
}

// class wants an error of one of the classes.
func (x *trial) class(what string, err error, want ...rotators.Class) {
	if x.noted(err) == nil {
		x.fail("%s: want an error of class %v, got none", what, want)
	}
	if got := rotators.ClassOf(err); !slices.Contains(want, got) {
		x.fail("%s: got class %s, want %v: %v", what, got, want, err)
	}
}

// census is Inspect by id.
func (x *trial) census() map[rotators.VersionID]rotators.VersionInfo {
	infos, err := x.Again.Inspect(x.ctx)
	x.ok("inspect", err)
	byID := map[rotators.VersionID]rotators.VersionInfo{}
	for _, i := range infos {
		if _, twice := byID[i.ID]; twice {
			x.fail("inspect lists %q twice", i.ID)
		}
		i.LastUsedAt, i.Sessions = time.Time{}, 0 // they change by looking
		byID[i.ID] = i
	}
	return byID
}

func (x *trial) live() []rotators.VersionID {
	var live []rotators.VersionID
	for id, i := range x.census() {
		if i.Enabled {
			live = append(live, id)
		}
	}
	slices.Sort(live)
	return live
}

// unchanged runs f and wants the census to be the same afterwards.
func (x *trial) unchanged(what string, f func()) {
	before := x.census()
	f()
	after := x.census()
	if len(before) != len(after) {
		x.fail("%s changed the number of versions from %d to %d", what, len(before), len(after))
	}
	for id, b := range before {
		if after[id] != b {
			x.fail("%s changed version %q from %+v to %+v", what, id, b, after[id])
		}
	}
}

func (x *trial) open(v made) Session {
	x.accepted("before a session is opened", v)
	s, err := x.Open(x.ctx, v.m)
	if err != nil {
		x.fail("open a session with generation %d: %v", v.op.Generation, err)
	}
	x.mu.Lock()
	x.sessions = append(x.sessions, s)
	x.mu.Unlock()
	if !s.Alive() {
		x.fail("a session just opened is not alive")
	}
	return s
}

// wrong is v with every secret field altered.
func wrong(v made) made {
	fields := v.m.RevealAll()
	for _, name := range secretFields(v.m) {
		for i, c := range fields[name] {
			if c == 'A' {
				fields[name][i] = 'B'
			} else {
				fields[name][i] = 'A'
			}
		}
	}
	delete(fields, rotators.FieldDSN)
	v.m = rotators.NewMaterial(fields)
	return v
}

// searchForSecrets looks for every secret of the trial, in the usual disguises, in every error and in what was written.
func (x *trial) searchForSecrets() {
	text := strings.Builder{}
	for _, err := range x.errs {
		fmt.Fprintf(&text, "%v\n%+v\n%#v\n", err, err, err)
		for ; err != nil; err = errors.Unwrap(err) {
			fmt.Fprintf(&text, "%+v\n", err)
		}
	}
	if x.Written != nil {
		text.WriteString(x.Written())
	}
	haystack := text.String()
	for _, secret := range x.secrets {
		for form, needle := range disguises(secret) {
			if strings.Contains(haystack, needle) {
				x.fail("a secret (%s) is in an error or in what was written", form)
			}
		}
	}
}

func disguises(secret []byte) map[string]string {
	quoted, _ := json.Marshal(string(secret)) // a string cannot fail
	return map[string]string{
		"raw": string(secret), "hex": hex.EncodeToString(secret),
		"base64":        strings.TrimRight(base64.StdEncoding.EncodeToString(secret), "="),
		"base64url":     strings.TrimRight(base64.URLEncoding.EncodeToString(secret), "="),
		"URL-escaped":   url.QueryEscape(string(secret)),
		"path-escaped":  url.PathEscape(string(secret)),
		"JSON":          strings.Trim(string(quoted), `"`),
		"a byte slice":  strings.Trim(fmt.Sprint(secret), "[]"),
		"a Go literal":  strings.Trim(fmt.Sprintf("%q", secret), `"`),
		"upper-case 16": strings.ToUpper(hex.EncodeToString(secret)),
	}
}
