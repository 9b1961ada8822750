package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"

	"github.com/rekeyhq/rekey/internal/credential"
)

// CredentialList is one page of the inventory, by id.
type CredentialList struct {
	Credentials []Credential `json:"credentials"`
	Next        string       `json:"next,omitempty" doc:"Where the next page begins: pass it as after; absent on the last page"`
}

type (
	listInput struct {
		Team        string `query:"team"`
		Target      string `query:"target"`
		Owner       string `query:"owner"`
		Environment string `query:"environment"`
		State       string `query:"state" doc:"One of the states, several joined by commas"`
		After       string `query:"after" doc:"Only ids behind this one"`
		Limit       int    `query:"limit" minimum:"1" maximum:"10000" default:"1000"`
	}
	listOutput struct{ Body CredentialList }

	// OnePath names one credential.
	OnePath struct {
		Team string `path:"team" maxLength:"63"`
		Name string `path:"name" maxLength:"63"`
	}
	oneOutput struct{ Body Credential }

	verbInput struct {
		OnePath
		Body struct {
			Reason string `json:"reason,omitempty" maxLength:"1000" doc:"For the audit entry"`
		} `required:"false"`
	}
)

func (s *Server) registerCredentials() {
	read := need{scopes: []Scope{ScopeRead}}
	add(s, operation(http.MethodGet, "/v1/credentials", "list-credentials", "List credentials", read), s.listCredentials)
	add(s, operation(http.MethodGet, "/v1/credentials/{team}/{name}", "get-credential", "Show a credential", read), s.getCredential)
	for _, v := range []struct {
		verb    credential.Verb
		scope   Scope
		summary string
	}{
		{credential.Rotate, ScopeRotate, "Rotate now"},
		{credential.Hold, ScopeOperate, "Keep the overlap open"},
		{credential.Rollback, ScopeOperate, "Give consumers the previous version again"},
		{credential.Pause, ScopeOperate, "Start no step"},
		{credential.Resume, ScopeOperate, "Undo pause, hold and park"},
		{credential.Restore, ScopeOperate, "Make a new version after a kill"},
	} {
		op := operation(http.MethodPost, "/v1/credentials/{team}/{name}/"+string(v.verb), string(v.verb)+"-credential", v.summary, need{scopes: []Scope{v.scope}})
		op.Errors = append(op.Errors, http.StatusNotFound, http.StatusConflict)
		add(s, op, func(ctx context.Context, in *verbInput) (*oneOutput, error) {
			return s.steer(ctx, in, v.verb)
		})
	}
}

func (s *Server) listCredentials(ctx context.Context, in *listInput) (*listOutput, error) {
	if err := s.fleet.wait(ctx); err != nil {
		return nil, huma.Error503ServiceUnavailable("the inventory is still being read")
	}
	me, now := who(ctx), s.Now()
	states := map[string]bool{}
	for _, state := range strings.FieldsFunc(in.State, func(c rune) bool { return c == ',' }) {
		if !slices.Contains(credential.States(), state) {
			return nil, huma.Error422UnprocessableEntity(fmt.Sprintf("state %q: want one of %s", clip(state), strings.Join(credential.States(), ", ")))
		}
		states[state] = true
	}
	is := func(want, have string) bool { return want == "" || want == have }
	out := &listOutput{Body: CredentialList{Credentials: []Credential{}}}
	for _, r := range s.fleet.all() {
		switch {
		case !me.allows(r.ID.Team()) || string(r.ID) <= in.After:
		case !is(in.Team, r.ID.Team()) || !is(in.Target, r.Spec.Target) || !is(in.Owner, r.Spec.Owner) || !is(in.Environment, r.Spec.Environment):
		case len(states) > 0 && !states[r.State()]:
		case len(out.Body.Credentials) == in.Limit:
			out.Body.Next = out.Body.Credentials[in.Limit-1].ID
			return out, nil
		default:
			out.Body.Credentials = append(out.Body.Credentials, s.view(r, now))
		}
	}
	return out, nil
}

func (s *Server) getCredential(ctx context.Context, in *OnePath) (*oneOutput, error) {
	id, err := parse(in.Team, in.Name)
	if err != nil {
		return nil, err
	}
	r, _, err := s.load(ctx, id)
	if err != nil {
		return nil, err
	}
	return &oneOutput{s.view(r, s.Now())}, nil
}

// load reads a record; its error is the answer.
func (s *Server) load(ctx context.Context, id credential.ID) (credential.Record, uint64, error) {
	r, seq, err := s.Ledger.Get(ctx, id)
	switch {
	case err == nil:
		return r, seq, nil
	case errors.Is(err, credential.ErrNotFound):
		message := fmt.Sprintf("there is no credential %q", id)
		if near := s.fleet.near(id, who(ctx).allows); len(near) > 0 {
			message += "; did you mean " + strings.ReplaceAll(joined(near), ", ", " or ") + "?"
		}
		return r, 0, huma.Error404NotFound(message)
	default:
		return r, 0, s.unavailable("read record", err)
	}
}

// unavailable logs what the client need not know and answers that the ledger failed.
func (s *Server) unavailable(what string, err error) error {
	if errors.Is(err, credential.ErrSchema) {
		return huma.Error409Conflict("the record was written by a newer build: upgrade this server")
	}
	if errors.Is(err, context.Canceled) {
		return huma.NewError(499, "the client went away")
	}
	s.Logger.Error("request failed", "doing", what, "error", err)
	return huma.Error503ServiceUnavailable("the ledger does not answer: try again; the server's log says more")
}

// checkReason refuses what could pass for other lines, or steer a terminal, when it is printed.
func checkReason(reason string) error {
	if strings.ContainsFunc(reason, func(c rune) bool { return unicode.IsControl(c) || c == utf8.RuneError }) {
		return huma.Error422UnprocessableEntity("reason: want one line of text without control characters")
	}
	return nil
}

func (s *Server) steer(ctx context.Context, in *verbInput, verb credential.Verb) (*oneOutput, error) {
	id, err := parse(in.Team, in.Name)
	if err != nil {
		return nil, err
	}
	if err := checkReason(in.Body.Reason); err != nil {
		return nil, err
	}
	r, err := s.commit(ctx, id, credential.Request{Verb: verb, Actor: who(ctx).Name, Reason: in.Body.Reason})
	if err != nil {
		return nil, err
	}
	return &oneOutput{s.view(r, s.Now())}, nil
}

// commitTries bounds how often a request is decided anew because others committed first.
const commitTries = 20

// commit asks Next and commits what it says, again as long as others come first. Its error is the answer. The schedule in the
// commit rings for whoever has to act.
func (s *Server) commit(ctx context.Context, id credential.ID, q credential.Request) (credential.Record, error) {
	for range commitTries {
		r, seq, err := s.load(ctx, id)
		if err != nil {
			return r, err
		}
		next, _, err := credential.Next(r, q, s.Now())
		switch {
		case errors.Is(err, credential.ErrRefused):
			return r, huma.Error409Conflict(refusal(err))
		case err != nil:
			return r, s.unavailable("decide", err)
		case next.Rev == r.Rev:
			return r, nil
		}
		_, err = s.Ledger.Commit(ctx, next, seq)
		if errors.Is(err, credential.ErrUncertain) { // the reply was lost: was the commit?
			if now, _, gerr := s.Ledger.Get(ctx, id); gerr == nil && now.Rev == next.Rev && now.Entry.Hash == next.Entry.Hash {
				err = nil
			}
		}
		switch {
		case err == nil:
			s.fleet.put(next)
			s.Logger.Info("request committed", "credential", string(id), "verb", string(q.Verb), "actor", q.Actor, "rev", next.Rev)
			return next, nil
		case errors.Is(err, credential.ErrStale), errors.Is(err, credential.ErrUncertain):
		default:
			return r, s.unavailable("commit", err)
		}
	}
	return credential.Record{}, huma.Error503ServiceUnavailable("others keep committing first: try again")
}

// refusal is the text of a refusal without the word that marks it.
func refusal(err error) string {
	return strings.TrimSuffix(err.Error(), ": "+credential.ErrRefused.Error())
}
