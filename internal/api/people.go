package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
)

// IdentityView is an identity without its token's hash.
type IdentityView struct {
	Name      string    `json:"name"`
	Scopes    []Scope   `json:"scopes"`
	Teams     []string  `json:"teams,omitempty"`
	CreatedAt time.Time `json:"created_at"`
	CreatedBy string    `json:"created_by,omitempty"`
}

// NewIdentity asks for an identity. The client draws the token (see NewToken) and sends only its hash: no answer ever holds one.
type NewIdentity struct {
	Name        string   `json:"name" maxLength:"63"`
	Scopes      []Scope  `json:"scopes" maxItems:"16" doc:"read, rotate, operate, emergency, apply, admin, metrics"`
	Teams       []string `json:"teams,omitempty" maxItems:"1000" doc:"Limit to these teams' credentials"`
	TokenSHA256 string   `json:"token_sha256" doc:"Hexadecimal SHA-256 of a token of 256 random bits that the client draws and keeps"`
}

type (
	identitiesOutput struct {
		Body struct {
			Identities []IdentityView `json:"identities"`
		}
	}
	identityInput  struct{ Body NewIdentity }
	identityOutput struct{ Body IdentityView }
	nameInput      struct {
		Name string `path:"name" maxLength:"63"`
	}
)

func (s *Server) registerIdentities() {
	n := need{scopes: []Scope{ScopeAdmin}}
	add(s, operation(http.MethodGet, "/v1/identities", "list-identities", "List identities", n), s.listIdentities)
	op := operation(http.MethodPost, "/v1/identities", "add-identity", "Add an identity", n)
	op.DefaultStatus = http.StatusCreated
	op.Errors = append(op.Errors, http.StatusConflict)
	add(s, op, s.addIdentity)
	op = operation(http.MethodDelete, "/v1/identities/{name}", "remove-identity", "Remove an identity; its token stops working at once", n)
	op.Errors = append(op.Errors, http.StatusNotFound, http.StatusConflict)
	add(s, op, s.removeIdentity)
}

func seen(i Identity) IdentityView {
	return IdentityView{i.Name, i.Scopes, i.Teams, i.CreatedAt, i.CreatedBy}
}

func (s *Server) listIdentities(context.Context, *struct{}) (*identitiesOutput, error) {
	out := &identitiesOutput{}
	out.Body.Identities = []IdentityView{}
	for _, i := range s.Identities.List() {
		out.Body.Identities = append(out.Body.Identities, seen(i))
	}
	return out, nil
}

func (s *Server) addIdentity(ctx context.Context, in *identityInput) (*identityOutput, error) {
	i := Identity{
		Name: in.Body.Name, Scopes: in.Body.Scopes, Teams: in.Body.Teams, TokenSHA256: strings.ToLower(in.Body.TokenSHA256),
		CreatedAt: s.Now().UTC(), CreatedBy: who(ctx).Name,
	}
	if bad := i.problems(); len(bad) > 0 {
		return nil, huma.Error422UnprocessableEntity(strings.Join(bad, "; "))
	}
	added, err := s.Identities.Add(i)
	switch {
	case errors.Is(err, ErrIdentityExists), errors.Is(err, ErrTokenTaken):
		return nil, huma.Error409Conflict(fmt.Sprintf("add identity %s: %v", i.Name, err))
	case err != nil:
		s.Logger.Error("write identities", "error", err)
		return nil, huma.Error500InternalServerError("the identities could not be written: the server's log says why")
	}
	s.Logger.Warn("identity added", "identity", i.Name, "scopes", joined(i.Scopes), "actor", i.CreatedBy)
	return &identityOutput{seen(added)}, nil
}

func (s *Server) removeIdentity(ctx context.Context, in *nameInput) (*struct{}, error) {
	err := s.Identities.Remove(in.Name)
	switch {
	case errors.Is(err, ErrNoIdentity):
		return nil, huma.Error404NotFound(fmt.Sprintf("there is no identity %q", clip(in.Name)))
	case errors.Is(err, ErrLastAdmin):
		return nil, huma.Error409Conflict(fmt.Sprintf("identity %s stays: %v", in.Name, err))
	case err != nil:
		s.Logger.Error("write identities", "error", err)
		return nil, huma.Error500InternalServerError("the identities could not be written: the server's log says why")
	}
	s.Logger.Warn("identity removed", "identity", in.Name, "actor", who(ctx).Name)
	return nil, nil
}
