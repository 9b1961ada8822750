package api

import (
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Credential is one credential as its record says it is. It holds no secret: Reference says where consumers read it.
type Credential struct {
	ID          string            `json:"id" doc:"team/name"`
	Target      string            `json:"target"`
	Kind        string            `json:"kind"`
	Owner       string            `json:"owner"`
	Environment string            `json:"environment"`
	Purpose     string            `json:"purpose"`
	Labels      map[string]string `json:"labels,omitempty"`
	Store       string            `json:"store"`
	Reference   string            `json:"reference" doc:"Where consumers read the current secret"`
	Plan        string            `json:"plan" enum:"overlap,minted,in-place"`
	Managed     bool              `json:"managed" doc:"false after it left the configuration"`

	State      string    `json:"state" doc:"The one word to read first: ok, retrying, parked, paused, held, overdue, unmanaged, replacing, killing, suspended"`
	Phase      string    `json:"phase"`
	Since      time.Time `json:"since,omitzero" doc:"When the phase was entered"`
	Generation uint64    `json:"generation" doc:"The highest ever admitted"`
	Epoch      uint64    `json:"epoch" doc:"Raised by every emergency"`
	Rev        uint64    `json:"rev" doc:"Raised by every commit"`
	Reason     string    `json:"reason,omitempty" doc:"Why the generation in flight was admitted"`

	Current   *Version  `json:"current,omitempty" doc:"What consumers read"`
	Old       *Version  `json:"old,omitempty" doc:"What they read before, until it is proven dead"`
	Candidate *Version  `json:"candidate,omitempty" doc:"Being made; nobody reads it yet"`
	Dead      []Version `json:"dead,omitempty" doc:"Disabled by a kill, not yet deleted"`
	Foreign   []string  `json:"foreign,omitempty" doc:"Versions at the issuer that are not ours, as last seen; never touched"`

	Every        string    `json:"every" doc:"Rotation interval; 0s: on request only"`
	AgeSeconds   float64   `json:"age_seconds,omitempty" doc:"Since consumers were given the current version"`
	LastRotation time.Time `json:"last_rotation,omitzero"`
	NextRotation time.Time `json:"next_rotation,omitzero"`
	OverlapUntil time.Time `json:"overlap_until,omitzero"`
	Lagging      []string  `json:"lagging,omitempty" doc:"Required consumers that have not acknowledged the current version"`
	Overdue      bool      `json:"overdue,omitempty"`
	Paused       bool      `json:"paused,omitempty"`
	Hold         bool      `json:"hold,omitempty"`

	Parked   *Failure  `json:"parked,omitempty" doc:"Waits for a human; why"`
	Failure  *Failure  `json:"failure,omitempty" doc:"The last one, until a step succeeds"`
	Attempt  int       `json:"attempt,omitempty" doc:"Failed tries of this phase"`
	RetryAt  time.Time `json:"retry_at,omitzero"`
	Failed   int       `json:"failed,omitempty" doc:"Rotations abandoned in a row"`
	Worker   string    `json:"worker,omitempty" doc:"Who performs the phase's step at this moment"`
	WorkedBy time.Time `json:"worked_until,omitzero" doc:"When that worker is done or has given up"`

	Emergency *Emergency `json:"emergency,omitempty"`
	// LastIncident is the last emergency order that reached the credential.
	LastIncident string `json:"last_incident,omitempty"`
	Proven       bool   `json:"proven,omitempty" doc:"What the last revocation ended was refused at a login"`
	Swept        bool   `json:"swept,omitempty" doc:"After a kill: the second sweep is done"`
	Residual     string `json:"residual,omitempty" doc:"Why it is not proven, or what outlives it"`
}

// Version is one generation at the issuer.
type Version struct {
	ID         string    `json:"id,omitempty" doc:"The issuer's own: a role, an access key id"`
	Generation uint64    `json:"generation,omitempty"`
	Epoch      uint64    `json:"epoch,omitempty"`
	OpID       uuid.UUID `json:"op_id,omitzero"`
	CreatedAt  time.Time `json:"created_at,omitzero"`
	AppliedAt  time.Time `json:"applied_at,omitzero"`
	PromotedAt time.Time `json:"promoted_at,omitzero"`
}

// Failure is a step that did not succeed.
type Failure struct {
	Class   string    `json:"class"`
	Phase   string    `json:"phase"`
	Message string    `json:"message"`
	At      time.Time `json:"at"`
}

// Emergency is the order that the credential is under.
type Emergency struct {
	Mode     string    `json:"mode" enum:"kill,replace"`
	Incident string    `json:"incident"`
	Reason   string    `json:"reason,omitempty"`
	Actor    string    `json:"actor"`
	At       time.Time `json:"at"`
}

// view shows a record at an instant.
func (s *Server) view(r credential.Record, now time.Time) Credential {
	c := Credential{
		ID: string(r.ID), Target: r.Spec.Target, Kind: r.Spec.Kind, Owner: r.Spec.Owner, Environment: r.Spec.Environment,
		Purpose: r.Spec.Purpose, Labels: r.Spec.Labels, Store: r.Spec.Store, Reference: s.Reference(r.Spec.Store, string(r.ID)),
		Plan: string(r.Plan), Managed: r.Managed,
		State: r.State(), Phase: string(r.Phase), Since: r.Since, Generation: r.Generation, Epoch: r.Epoch, Rev: r.Rev, Reason: r.Reason,
		Current: version(r.Current), Old: version(r.Old), Candidate: version(r.Candidate), Foreign: r.Foreign,
		Every: r.Spec.Every.String(), LastRotation: r.LastRotation, NextRotation: r.NextRotation, OverlapUntil: r.OverlapUntil(),
		Overdue: r.Overdue, Paused: r.Paused, Hold: r.Hold,
		Parked: failure(r.Parked), Failure: failure(r.Failure), Attempt: r.Attempt, RetryAt: r.RetryAt, Failed: r.Failed,
		LastIncident: r.LastIncident(), Proven: r.Proven, Swept: r.Swept, Residual: r.Residue,
	}
	for _, v := range r.Dead {
		c.Dead = append(c.Dead, *version(&v))
	}
	if r.Phase == credential.Draining {
		c.Lagging = r.Lagging()
	}
	if r.Current != nil && !r.Current.PromotedAt.IsZero() {
		c.AgeSeconds = max(0, now.Sub(r.Current.PromotedAt).Seconds())
	}
	if r.Claim != nil {
		c.Worker, c.WorkedBy = r.Claim.Worker, r.Claim.Until
	}
	if e := r.Emergency; e != nil {
		c.Emergency = &Emergency{Mode: e.Mode, Incident: e.Incident, Reason: e.Reason, Actor: e.Actor, At: e.At}
	}
	return c
}

func version(v *credential.Version) *Version {
	if v == nil {
		return nil
	}
	return &Version{
		ID: string(v.ID), Generation: v.Generation, Epoch: v.Epoch, OpID: v.OpID,
		CreatedAt: v.CreatedAt, AppliedAt: v.AppliedAt, PromotedAt: v.PromotedAt,
	}
}

func failure(f *credential.Failure) *Failure {
	if f == nil {
		return nil
	}
	return &Failure{Class: f.Class, Phase: string(f.Phase), Message: f.Message, At: f.At}
}
