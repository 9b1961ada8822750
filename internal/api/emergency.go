package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Incident is an emergency order and how far it has come.
type Incident struct {
	ID        string    `json:"id"`
	Mode      string    `json:"mode" enum:"kill,replace"`
	Hash      string    `json:"hash" doc:"SHA-256 over mode and list"`
	Reason    string    `json:"reason,omitempty"`
	Actor     string    `json:"actor"`
	CreatedAt time.Time `json:"created_at"`
	// Expanded is true once every record carries the order. No step starts for a listed credential before that.
	Expanded    bool       `json:"expanded"`
	Complete    bool       `json:"complete" doc:"Every credential is done"`
	Credentials []Progress `json:"credentials"`
}

// Progress is how far an order has come for one credential.
type Progress struct {
	ID       string `json:"id"`
	Reached  bool   `json:"reached" doc:"The record carries the order, or a later one"`
	State    string `json:"state,omitempty"`
	Phase    string `json:"phase,omitempty"`
	Disabled bool   `json:"disabled" doc:"kill: the issuer has confirmed that every version is disabled; replace: the old version is gone"`
	Proven   bool   `json:"proven" doc:"kill: every version was refused at a login; replace: so was the old one"`
	Done     bool   `json:"done"`
	Residual string `json:"residual,omitempty" doc:"Why it is not proven, or what outlives it"`
	Problem  string `json:"problem,omitempty" doc:"Why it does not go on"`
}

type (
	orderInput struct {
		OnePath
		Body struct {
			Reason   string `json:"reason,omitempty" maxLength:"1000" doc:"For the audit entry and the event"`
			Incident string `json:"incident,omitempty" pattern:"^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$" doc:"Idempotency key: the same order under the same id is carried out once. A UUID if absent"`
		} `required:"false"`
	}
	incidentInput struct {
		ID string `path:"id" maxLength:"63"`
	}
	incidentOutput struct {
		Status int `json:"-"`
		Body   Incident
	}
)

func (s *Server) registerEmergencies() {
	for mode, summary := range map[string]string{
		credential.ModeKill:    "Emergency: disable every version",
		credential.ModeReplace: "Emergency: make a new version, then revoke the old one at once",
	} {
		op := operation(http.MethodPost, "/v1/credentials/{team}/{name}/"+mode, mode+"-credential", summary,
			need{scopes: []Scope{ScopeEmergency}, lane: laneEmergency})
		op.DefaultStatus = http.StatusAccepted
		op.Errors = append(op.Errors, http.StatusNotFound, http.StatusConflict)
		add(s, op, func(ctx context.Context, in *orderInput) (*incidentOutput, error) {
			return s.order(ctx, in, mode)
		})
	}
	op := operation(http.MethodGet, "/v1/incidents/{id}", "get-incident", "Show an emergency order", need{scopes: []Scope{ScopeRead, ScopeEmergency}})
	op.Errors = append(op.Errors, http.StatusNotFound)
	add(s, op, func(ctx context.Context, in *incidentInput) (*incidentOutput, error) {
		i, err := s.incident(ctx, in.ID)
		if err != nil {
			return nil, err
		}
		return &incidentOutput{Status: http.StatusOK, Body: s.progress(ctx, i)}, nil
	})
}

// order writes the incident: that is the emergency's commit, and the scheduler carries it to the record. The record is asked first
// whether it would take it.
func (s *Server) order(ctx context.Context, in *orderInput, mode string) (*incidentOutput, error) {
	id, err := parse(in.Team, in.Name)
	if err != nil {
		return nil, err
	}
	if err := checkReason(in.Body.Reason); err != nil {
		return nil, err
	}
	me := who(ctx)
	i := credential.Incident{
		ID: in.Body.Incident, Mode: mode, Credentials: []credential.ID{id}, Reason: in.Body.Reason, Actor: me.Name, CreatedAt: s.Now().UTC(),
	}
	i.Hash = i.Sum()
	accepted := func(i credential.Incident) (*incidentOutput, error) {
		return &incidentOutput{Status: http.StatusAccepted, Body: s.progress(ctx, i)}, nil
	}
	if i.ID == "" {
		i.ID = uuid.NewString()
	} else if have, _, err := s.Ledger.GetIncident(ctx, i.ID); err == nil {
		if err := sameOrder(have, i); err != nil {
			return nil, err
		}
		return accepted(have)
	} else if !errors.Is(err, credential.ErrNotFound) {
		return nil, s.unavailable("read incident", err)
	}
	r, _, err := s.load(ctx, id)
	if err != nil {
		return nil, err
	}
	verb := credential.Kill
	if mode == credential.ModeReplace {
		verb = credential.Replace
	}
	if _, _, err := credential.Next(r, credential.Request{Verb: verb, Actor: me.Name, Reason: i.Reason, Incident: i.ID}, s.Now()); err != nil {
		if errors.Is(err, credential.ErrRefused) {
			return nil, huma.Error409Conflict(refusal(err))
		}
		return nil, s.unavailable("decide", err)
	}
	for range commitTries {
		have, _, err := s.Ledger.CreateIncident(ctx, i)
		switch {
		case err == nil:
			s.Logger.Warn("emergency ordered", "incident", i.ID, "mode", mode, "credential", string(id), "actor", me.Name)
			return accepted(have)
		case errors.Is(err, credential.ErrStale): // written a moment ago, perhaps by us
			if err := sameOrder(have, i); err != nil {
				return nil, err
			}
			return accepted(have)
		case !errors.Is(err, credential.ErrUncertain):
			return nil, s.unavailable("create incident", err)
		}
	}
	return nil, huma.Error503ServiceUnavailable(fmt.Sprintf("it is unknown whether the order was written: repeat it with incident %q", i.ID))
}

// sameOrder refuses an id that stands for another order.
func sameOrder(have, want credential.Incident) error {
	if have.Hash == want.Hash && have.Sum() == want.Sum() {
		return nil
	}
	return huma.Error409Conflict(fmt.Sprintf("incident %s is another order (%s of %s): choose another id", want.ID, have.Mode, joined(have.Credentials)))
}

func (s *Server) incident(ctx context.Context, id string) (credential.Incident, error) {
	if !validName(id) {
		return credential.Incident{}, huma.Error404NotFound(fmt.Sprintf("there is no incident %q", clip(id)))
	}
	i, _, err := s.Ledger.GetIncident(ctx, id)
	me := who(ctx)
	hidden := slices.ContainsFunc(i.Credentials, func(c credential.ID) bool { return !me.allows(c.Team()) })
	switch {
	case errors.Is(err, credential.ErrNotFound) || err == nil && hidden:
		return i, huma.Error404NotFound(fmt.Sprintf("there is no incident %q", id))
	case err != nil:
		return i, s.unavailable("read incident", err)
	}
	return i, nil
}

// progress looks at every listed record.
func (s *Server) progress(ctx context.Context, i credential.Incident) Incident {
	out := Incident{
		ID: i.ID, Mode: i.Mode, Hash: i.Hash, Reason: i.Reason, Actor: i.Actor, CreatedAt: i.CreatedAt, Expanded: i.Expanded, Complete: true,
		Credentials: []Progress{},
	}
	for _, id := range i.Credentials {
		p := Progress{ID: string(id)}
		if r, _, err := s.Ledger.Get(ctx, id); err != nil {
			p.Problem = "its record cannot be read"
			if errors.Is(err, credential.ErrNotFound) {
				p.Problem, p.Done = "there is no such credential any more", i.Expanded
			}
		} else {
			p = progressOf(i, r)
		}
		out.Complete = out.Complete && p.Done
		out.Credentials = append(out.Credentials, p)
	}
	return out
}

// progressOf says how far order i has come for r.
func progressOf(i credential.Incident, r credential.Record) Progress {
	p := Progress{ID: string(r.ID), State: r.State(), Phase: string(r.Phase), Residual: r.Residue}
	reached, last := r.Ordered(i.ID), r.LastIncident() == i.ID
	p.Reached = reached || i.Expanded
	switch {
	case r.Parked != nil:
		p.Problem = r.Parked.Message
	case r.Failure != nil:
		p.Problem = r.Failure.Message
	}
	switch {
	case !reached: // refused, or still on its way: there is nothing to wait for once it was expanded
		if p.Done = i.Expanded; p.Done {
			p.Problem = "the record refused the order"
		}
	case !last: // a later order carries on what this one began
		p.Done, p.Problem = true, "overtaken by incident "+r.LastIncident()
	case r.Emergency == nil: // over: restored after a kill, or replaced
		p.Disabled, p.Proven, p.Done = true, r.Proven, true
	case i.Mode == credential.ModeKill:
		p.Disabled = r.Phase != credential.Killing
		p.Proven, p.Done = r.Proven, r.Phase == credential.Suspended || r.Phase == credential.SweepingKill
	}
	return p
}
