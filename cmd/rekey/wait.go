package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/credential"
)

// How a wait looks: how often, and how long a server that does not answer is waited for, as it may be restarting.
const (
	lookEvery   = 300 * time.Millisecond
	serverGrace = 30 * time.Second
)

// progress shows what is waited for, on standard error: one changing line on a terminal, one line for each change otherwise.
type progress struct {
	a        *app
	terminal bool
	last     string
	turn     int
}

func (a *app) progress() *progress { return &progress{a: a, terminal: isTerminal(a.stderr)} }

func (p *progress) show(text string) {
	if p.terminal {
		p.turn++
		fmt.Fprintf(p.a.stderr, "\r\x1b[K%c %s", []rune(`⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏`)[p.turn%10], text)
	} else if text != p.last {
		fmt.Fprintln(p.a.stderr, text)
	}
	p.last = text
}

// end leaves the terminal's line clean.
func (p *progress) end() {
	if p.terminal && p.last != "" {
		fmt.Fprint(p.a.stderr, "\r\x1b[K")
	}
}

// look asks until done says so. Its error, and running out of time, are exitWait; Ctrl-C says what goes on without us.
func look[T any](ctx context.Context, p *progress, timeout time.Duration, goesOn string, ask func(context.Context) (T, error), done func(T) (text string, finished bool, failed error)) (T, error) {
	defer p.end()
	var none T
	limit := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		limit, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	var silentSince time.Time
	for {
		v, err := ask(limit)
		switch {
		case ctx.Err() != nil:
			return none, &exit{exitWait, fmt.Errorf("stopped watching; %s", goesOn)}
		case limit.Err() != nil:
			return none, &exit{exitWait, fmt.Errorf("not within %s; %s", timeout.Round(time.Millisecond), goesOn)}
		case errors.Is(err, api.ErrUnreachable):
			if silentSince.IsZero() {
				silentSince = p.a.now()
			}
			if p.a.now().Sub(silentSince) > serverGrace {
				return none, err
			}
			p.show("the server does not answer; it may be restarting")
		case err != nil:
			return none, err
		default:
			silentSince = time.Time{}
			text, finished, failed := done(v)
			if failed != nil {
				return v, &exit{exitWait, failed}
			}
			if finished {
				return v, nil
			}
			p.show(text)
		}
		select {
		case <-limit.Done():
		case <-time.After(lookEvery):
		}
	}
}

// waitRotated watches the rotations that were asked for, one after the other: they go on side by side.
func (a *app) waitRotated(ctx context.Context, client *api.Client, asked []api.Credential, revoked bool, timeout time.Duration) ([]api.Credential, error) {
	if c, err := client.Control(ctx); err == nil && c.Paused {
		fmt.Fprintf(a.stderr, "the whole fleet is paused by %s: nothing happens until `rekey resume --all`\n", c.Actor)
	}
	var done []api.Credential
	var errs []error
	began := a.now()
	for _, was := range asked {
		left := timeout
		if timeout > 0 {
			left = max(time.Millisecond, timeout-a.now().Sub(began))
		}
		id := credential.ID(was.ID)
		v, err := look(ctx, a.progress(), left, was.ID+" goes on rotating: see `rekey status "+was.ID+"`",
			func(ctx context.Context) (api.Credential, error) { return client.Get(ctx, id) },
			func(v api.Credential) (string, bool, error) { return rotated(v, was.Generation, revoked) })
		if err != nil {
			errs = append(errs, err)
			if ctx.Err() != nil {
				break
			}
			continue
		}
		v.Generation = was.Generation
		done = append(done, v)
	}
	return done, errors.Join(errs...)
}

// rotated says how far the rotation to generation has come.
func rotated(v api.Credential, generation uint64, revoked bool) (text string, finished bool, failed error) {
	promoted := v.Current != nil && v.Current.Generation >= generation
	text = fmt.Sprintf("%s: generation %d %s", v.ID, generation, phrase(v))
	switch {
	case promoted && (!revoked || v.Old == nil && v.Phase == string(credential.Idle)):
		return text, true, nil
	case v.Parked != nil:
		return text, false, fmt.Errorf("%s is parked: %s; when that is mended: rekey resume %s", v.ID, v.Parked.Message, v.ID)
	case v.State == "suspended" || v.State == "killing":
		return text, false, fmt.Errorf("%s was killed in the meantime (incident %s)", v.ID, v.LastIncident)
	case v.Paused:
		return text, false, fmt.Errorf("%s is paused: rekey resume %s", v.ID, v.ID)
	case !promoted && v.Phase == string(credential.Idle):
		return text, false, fmt.Errorf("%s: generation %d was given up, and is tried again %s; the version in use still works: see `rekey audit list %s`", v.ID, generation, until(v.NextRotation, time.Now()), v.ID)
	case !promoted && v.Generation > generation:
		return text, false, fmt.Errorf("%s: generation %d was given up; generation %d is under way", v.ID, generation, v.Generation)
	case v.Hold:
		text += " (held open: rekey resume " + v.ID + ")"
	}
	if v.Failure != nil {
		text += fmt.Sprintf("; try %d failed: %s", v.Attempt, v.Failure.Message)
	}
	return text, false, nil
}

// phrase is a phase as a human would say it.
func phrase(v api.Credential) string {
	words := map[credential.Phase]string{
		credential.Admitted: "waits for a worker", credential.Noting: "asks the issuer what it holds", credential.Minting: "is made by the issuer",
		credential.Attributing: "looks for what a lost reply made", credential.Staging: "is put into the store", credential.Applying: "is applied at the issuer",
		credential.Checking: "checks whether it was applied", credential.Proving: "proves that it can log in", credential.Promoting: "is given to consumers",
		credential.Draining: "is in use; the old one works until the overlap ends", credential.Reverting: "goes back to the previous one",
		credential.Disabling: "is in use; the old one is being disabled", credential.ProvingDead: "is in use; the old one is proven dead",
		credential.Deleting: "is in use; the old one is deleted", credential.Destroying: "is in use; the old secret is destroyed",
		credential.Withdrawing: "is withdrawn", credential.Discarding: "is discarded", credential.Idle: "is in use",
	}
	if w, ok := words[credential.Phase(v.Phase)]; ok {
		return w
	}
	return v.Phase
}
