package api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"slices"

	"github.com/danielgtaylor/huma/v2"

	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
)

// ApplyRequest declares everything that is to be managed. What the ledger has and the request has not becomes unmanaged:
// it stops rotating; nothing is revoked or deleted. For an identity that is limited to teams, everything means these teams'
// credentials, and targets stay as they are.
type ApplyRequest struct {
	Targets     []credential.Target               `json:"targets" required:"false"`
	Credentials map[credential.ID]credential.Spec `json:"credentials"`
	DryRun      bool                              `json:"dry_run,omitempty" doc:"Only say what would change"`
	Unprobed    bool                              `json:"unprobed,omitempty" doc:"Do not ask the issuers first whether they can be used"`
}

// ApplyResult lists every object on either side.
type ApplyResult struct {
	Changes []ApplyChange `json:"changes"`
	Applied bool          `json:"applied" doc:"false for a dry run"`
	Refused int           `json:"refused,omitempty" doc:"Dry run: changes that cannot be done; a real run would do nothing"`
	// Warnings are what the issuers had to say that does not keep them from being used.
	Warnings []string `json:"warnings,omitempty"`
	Failed   int      `json:"failed,omitempty" doc:"Changes that others or the ledger prevented in the middle: apply again"`
}

// ApplyChange is one change and, after a real run, why it was not made.
type ApplyChange struct {
	config.Change
	Error string `json:"error,omitempty"`
}

type (
	applyInput  struct{ Body ApplyRequest }
	applyOutput struct{ Body ApplyResult }
)

func (s *Server) registerApply() {
	s.applying = make(chan struct{}, 1)
	op := operation(http.MethodPost, "/v1/apply", "apply", "Declare targets and credentials", need{scopes: []Scope{ScopeApply}, long: true})
	op.MaxBodyBytes = maxApply
	op.Errors = append(op.Errors, http.StatusConflict)
	add(s, op, s.apply)
}

// apply finds every problem before it writes anything. A crash in the middle leaves some changes made: applying again makes the
// rest. Two at once wait for each other.
func (s *Server) apply(ctx context.Context, in *applyInput) (*applyOutput, error) {
	select {
	case s.applying <- struct{}{}:
		defer func() { <-s.applying }()
	case <-ctx.Done():
		return nil, huma.Error503ServiceUnavailable("another apply is under way: try again")
	}
	records, err := s.Ledger.List(ctx)
	if err != nil {
		return nil, s.unavailable("list records", err)
	}
	have, err := s.Ledger.Targets(ctx)
	if err != nil {
		return nil, s.unavailable("list targets", err)
	}
	desired, mine, err := s.declared(ctx, in.Body, records, have)
	if err != nil {
		return nil, err
	}
	out := &applyOutput{Body: ApplyResult{Changes: []ApplyChange{}}}
	for _, c := range config.Plan(mine, have, desired) {
		s.foresee(&c, mine, desired)
		if c.Action == config.Refused {
			out.Body.Refused++
		}
		out.Body.Changes = append(out.Body.Changes, ApplyChange{Change: c})
	}
	switch {
	case in.Body.DryRun:
		return out, nil
	case out.Body.Refused > 0:
		var details []error
		for _, c := range out.Body.Changes {
			if c.Action == config.Refused {
				details = append(details, &huma.ErrorDetail{Location: c.Object + "s." + c.ID, Message: c.Reason})
			}
		}
		return nil, huma.Error409Conflict("nothing was changed: some of it cannot be done now", details...)
	}
	if !in.Body.Unprobed {
		warnings, fatal := s.probe(ctx, out.Body.Changes, desired, mine)
		if len(fatal) > 0 {
			return nil, huma.Error422UnprocessableEntity("nothing was changed: rotating there would be unsafe or cannot work", fatal...)
		}
		out.Body.Warnings = warnings
	}
	s.write(ctx, out.Body.Changes, desired)
	out.Body.Applied = true
	for _, c := range out.Body.Changes {
		if c.Error != "" {
			out.Body.Failed++
		}
	}
	s.Logger.Info("applied", "actor", who(ctx).Name, "changes", len(out.Body.Changes), "failed", out.Body.Failed)
	return out, nil
}

// declared checks a request and returns it in canonical form, with the records that it is about.
func (s *Server) declared(ctx context.Context, q ApplyRequest, records []credential.Record, have []credential.Target) (config.Config, []credential.Record, error) {
	me := who(ctx)
	c := &checker{kinds: s.Kinds, store: s.Store}
	targets := q.Targets
	mine := records
	if len(me.Teams) > 0 {
		for id := range q.Credentials {
			if team := id.Team(); !me.allows(team) {
				return config.Config{}, nil, huma.Error403Forbidden(fmt.Sprintf("identity %s is limited to %s, and %s is not theirs: nothing was changed", me.Name, joined(me.Teams), clip(string(id))))
			}
		}
		for _, t := range targets {
			i := slices.IndexFunc(have, func(h credential.Target) bool { return h.Name == t.Name })
			t.Fields = c.canonical("targets."+clip(t.Name), t.Fields)
			if i < 0 || !reflect.DeepEqual(t, have[i]) {
				return config.Config{}, nil, huma.Error403Forbidden(fmt.Sprintf("identity %s is limited to %s and cannot add or change target %s: nothing was changed", me.Name, joined(me.Teams), clip(t.Name)))
			}
		}
		targets = have
		mine = slices.DeleteFunc(slices.Clone(records), func(r credential.Record) bool { return !me.allows(r.ID.Team()) })
	}
	desired := c.check(targets, q.Credentials)
	c.standing(slices.DeleteFunc(slices.Clone(records), func(r credential.Record) bool {
		_, declared := desired.Credentials[r.ID]
		return declared
	}), have)
	if len(c.problems) > 0 {
		var details []error
		for _, p := range c.problems {
			details = append(details, &huma.ErrorDetail{Location: p.location, Message: p.message})
		}
		return config.Config{}, nil, huma.Error422UnprocessableEntity("nothing was changed: the declaration is wrong", details...)
	}
	return desired, mine, nil
}

// foresee asks the machine whether a record would take a change, and marks it as refused if not.
func (s *Server) foresee(c *config.Change, records []credential.Record, desired config.Config) {
	if c.Object != "credential" {
		return
	}
	id := credential.ID(c.ID)
	i := slices.IndexFunc(records, func(r credential.Record) bool { return r.ID == id })
	var err error
	switch c.Action {
	case config.Create, config.Adopting:
		_, err = credential.New(id, s.Ledger.Incarnation(), desired.Credentials[id], "", s.Now())
	case config.Update, config.Manage:
		spec := desired.Credentials[id]
		_, _, err = credential.Next(records[i], credential.Request{Verb: credential.Declare, Spec: &spec}, s.Now())
	case config.Unmanage:
		_, _, err = credential.Next(records[i], credential.Request{Verb: credential.Release}, s.Now())
	default:
		return
	}
	if err != nil {
		c.Action, c.Reason = config.Refused, refusal(err)
	}
}

// write makes the changes: targets first, then credentials, then the targets that go.
func (s *Server) write(ctx context.Context, changes []ApplyChange, desired config.Config) {
	actor := who(ctx).Name
	each := func(object string, some func(config.Action) bool, f func(id string) error) {
		parallel(changes, func(c *ApplyChange) {
			if c.Object != object || !some(c.Action) {
				return
			}
			if err := f(c.ID); err != nil {
				c.Error = said(err)
			}
		})
	}
	wanted := func(a config.Action) bool { return a != config.Remove && a != config.Keep }
	each("target", wanted, func(name string) error {
		i := slices.IndexFunc(desired.Targets, func(t credential.Target) bool { return t.Name == name })
		return s.putTarget(ctx, desired.Targets[i])
	})
	for i, c := range changes { // a credential never comes before its target
		if c.Object == "target" && c.Error != "" {
			for j := range changes {
				spec, ok := desired.Credentials[credential.ID(changes[j].ID)]
				if ok && changes[j].Object == "credential" && spec.Target == c.ID {
					changes[j].Error = "target " + changes[i].ID + " could not be written"
				}
			}
		}
	}
	each("credential", func(a config.Action) bool { return a != config.None }, func(id string) error {
		return s.putCredential(ctx, credential.ID(id), desired, actor)
	})
	each("target", func(a config.Action) bool { return a == config.Remove }, func(name string) error { return s.removeTarget(ctx, name) })
}

// said is an error as an answer shows it.
func said(err error) string {
	var status huma.StatusError
	if errors.As(err, &status) {
		return status.Error()
	}
	return err.Error()
}

// putTarget makes the target's lanes before workers can see it, and heals lanes that were lost.
func (s *Server) putTarget(ctx context.Context, t credential.Target) error {
	if err := s.Ledger.EnsureLanes(ctx, t.Name, t.Concurrency); err != nil {
		return s.unavailable("make lanes", err)
	}
	for range commitTries {
		have, seq, err := s.Ledger.GetTarget(ctx, t.Name)
		switch {
		case err == nil && reflect.DeepEqual(have, t):
			return nil
		case errors.Is(err, credential.ErrNotFound):
			seq = 0
		case err != nil:
			return s.unavailable("read target", err)
		}
		_, err = s.Ledger.PutTarget(ctx, t, seq)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, credential.ErrStale), errors.Is(err, credential.ErrUncertain):
		default:
			return s.unavailable("write target", err)
		}
	}
	return huma.Error503ServiceUnavailable("others keep writing the target: try again")
}

// removeTarget removes the lanes first: a crash in between leaves a target that the next apply removes.
func (s *Server) removeTarget(ctx context.Context, name string) error {
	if err := s.Ledger.RemoveLanes(ctx, name); err != nil {
		return s.unavailable("remove lanes", err)
	}
	for range commitTries {
		_, seq, err := s.Ledger.GetTarget(ctx, name)
		if errors.Is(err, credential.ErrNotFound) {
			return nil
		}
		if err == nil {
			err = s.Ledger.DeleteTarget(ctx, name, seq)
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, credential.ErrStale), errors.Is(err, credential.ErrUncertain):
		default:
			return s.unavailable("remove target", err)
		}
	}
	return huma.Error503ServiceUnavailable("others keep writing the target: try again")
}

// putCredential brings one record to what is desired: created, declared anew, or released. It decides from the record as it is now,
// so that a repeat, or another's commit in between, leads to the same end.
func (s *Server) putCredential(ctx context.Context, id credential.ID, desired config.Config, actor string) error {
	spec, wanted := desired.Credentials[id]
	if !wanted {
		_, err := s.commit(ctx, id, credential.Request{Verb: credential.Release, Actor: actor})
		return err
	}
	r, _, err := s.Ledger.Get(ctx, id)
	for try := 0; errors.Is(err, credential.ErrNotFound); try++ {
		next, invalid := credential.New(id, s.Ledger.Incarnation(), spec, actor, s.Now())
		if invalid != nil {
			return invalid
		}
		_, err = s.Ledger.Commit(ctx, next, 0)
		switch {
		case err == nil:
			s.fleet.put(next)
			return nil
		case !errors.Is(err, credential.ErrStale) && !errors.Is(err, credential.ErrUncertain) || try == commitTries:
			return s.unavailable("create record", err)
		}
		r, _, err = s.Ledger.Get(ctx, id) // written by somebody, or by us
	}
	if err != nil {
		return s.unavailable("read record", err)
	}
	one := config.Config{Credentials: map[credential.ID]credential.Spec{id: spec}, Slots: desired.Slots}
	switch c := config.Plan([]credential.Record{r}, nil, one)[0]; c.Action {
	case config.None:
		return nil
	case config.Refused:
		return huma.Error409Conflict(c.Reason)
	}
	_, err = s.commit(ctx, id, credential.Request{Verb: credential.Declare, Actor: actor, Spec: &spec})
	return err
}

// parallel calls f for each change, some at once: the ledger commits them in one batch.
func parallel(changes []ApplyChange, f func(*ApplyChange)) {
	room := make(chan struct{}, 32)
	for i := range changes {
		if changes[i].Error != "" {
			continue
		}
		room <- struct{}{}
		go func() {
			defer func() { <-room }()
			f(&changes[i])
		}()
	}
	for range cap(room) {
		room <- struct{}{}
	}
}

func sortedIDs[V any](m map[credential.ID]V) []credential.ID { return slices.Sorted(maps.Keys(m)) }
