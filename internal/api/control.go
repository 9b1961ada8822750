package api

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Control is the fleet-wide switch. While Paused nothing is admitted and no step starts, emergencies apart.
type Control struct {
	Paused bool      `json:"paused"`
	Actor  string    `json:"actor,omitempty"`
	Reason string    `json:"reason,omitempty"`
	At     time.Time `json:"at,omitzero"`
}

// Target is an issuer instance. Fields hold secrets by reference only.
type Target struct {
	Name         string `json:"name"`
	Kind         string `json:"kind"`
	Environment  string `json:"environment"`
	Owner        string `json:"owner"`
	Concurrency  int    `json:"concurrency"`
	StepDeadline string `json:"step_deadline"`
	Exclusive    bool   `json:"exclusive,omitempty"`
	Credentials  int    `json:"credentials" doc:"How many there are"`
	Parked       int    `json:"parked,omitempty" doc:"How many of them wait for a human"`
}

type (
	controlInput struct {
		Body struct {
			Paused bool   `json:"paused"`
			Reason string `json:"reason,omitempty" maxLength:"1000"`
		}
	}
	controlOutput struct{ Body Control }
	targetsOutput struct {
		Body struct {
			Targets []Target `json:"targets"`
		}
	}
)

func (s *Server) registerFleet() {
	add(s, operation(http.MethodGet, "/v1/control", "get-control", "Show the fleet-wide pause", need{scopes: []Scope{ScopeRead}}), s.getControl)
	add(s, operation(http.MethodPost, "/v1/control", "set-control", "Pause or resume the whole fleet",
		need{scopes: []Scope{ScopeOperate}, fleet: true}), s.setControl)
	add(s, operation(http.MethodGet, "/v1/targets", "list-targets", "List targets", need{scopes: []Scope{ScopeRead}}), s.listTargets)
}

func (s *Server) getControl(ctx context.Context, _ *struct{}) (*controlOutput, error) {
	c, _, err := s.Ledger.GetControl(ctx)
	if err != nil {
		return nil, s.unavailable("read control", err)
	}
	return &controlOutput{Control(c)}, nil
}

// setControl writes the switch; the last writer wins. Saying what is the case already changes nothing.
func (s *Server) setControl(ctx context.Context, in *controlInput) (*controlOutput, error) {
	if err := checkReason(in.Body.Reason); err != nil {
		return nil, err
	}
	for range commitTries {
		have, seq, err := s.Ledger.GetControl(ctx)
		if err != nil {
			return nil, s.unavailable("read control", err)
		}
		if have.Paused == in.Body.Paused {
			return &controlOutput{Control(have)}, nil
		}
		want := credential.Control{Paused: in.Body.Paused, Actor: who(ctx).Name, Reason: in.Body.Reason, At: s.Now().UTC()}
		_, err = s.Ledger.SetControl(ctx, want, seq)
		switch {
		case err == nil:
			s.Logger.Warn("fleet switched", "paused", want.Paused, "actor", want.Actor, "reason", want.Reason)
			return &controlOutput{Control(want)}, nil
		case errors.Is(err, credential.ErrStale), errors.Is(err, credential.ErrUncertain):
		default:
			return nil, s.unavailable("write control", err)
		}
	}
	return nil, huma.Error503ServiceUnavailable("others keep switching: try again")
}

// listTargets shows an identity that is limited to teams only the targets that its credentials live at.
func (s *Server) listTargets(ctx context.Context, _ *struct{}) (*targetsOutput, error) {
	if err := s.fleet.wait(ctx); err != nil {
		return nil, huma.Error503ServiceUnavailable("the inventory is still being read")
	}
	targets, err := s.Ledger.Targets(ctx)
	if err != nil {
		return nil, s.unavailable("list targets", err)
	}
	me := who(ctx)
	count, parked := map[string]int{}, map[string]int{}
	s.fleet.each(func(r credential.Record) {
		if !me.allows(r.ID.Team()) {
			return
		}
		count[r.Spec.Target]++
		if r.Parked != nil {
			parked[r.Spec.Target]++
		}
	})
	out := &targetsOutput{}
	out.Body.Targets = []Target{}
	for _, t := range byName(targets) {
		if len(me.Teams) > 0 && count[t.Name] == 0 {
			continue
		}
		out.Body.Targets = append(out.Body.Targets, Target{
			Name: t.Name, Kind: t.Kind, Environment: t.Environment, Owner: t.Owner, Concurrency: t.Concurrency,
			StepDeadline: t.StepDeadline.String(), Exclusive: t.Exclusive, Credentials: count[t.Name], Parked: parked[t.Name],
		})
	}
	return out, nil
}
