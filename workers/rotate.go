package workers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

// adopt proves an existing secret and publishes it. The issuer is not changed.
func (r *run) adopt(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, st, err := r.tools(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	if r.record.Spec.Adopt == nil {
		return credential.Outcome{}, rotators.Faultf(rotators.Refused, "adopt "+string(e.Version.ID), "the configuration no longer says how")
	}
	fields := map[string][]byte{}
	for name, ref := range r.record.Spec.Adopt.Material {
		b, err := r.Resolve(ctx, ref)
		if err != nil {
			return credential.Outcome{}, rotators.Faultf(rotators.Refused, "adopt "+string(e.Version.ID), "field %s: %w", name, err)
		}
		fields[name] = b
	}
	m := rotators.NewMaterial(fields)
	out, err := verdict(rot.Prove(ctx, e.Op, e.Version.ID, m))
	if err != nil || out.Result != credential.Accepted {
		if out.Result == credential.Rejected {
			out.Message = "the issuer refused the secret to adopt: check adopt.version and adopt.material"
		}
		return out, err
	}
	k := r.key(e.Version)
	if _, err := st.Stage(ctx, store.Secret{Key: k, Material: m}); err != nil {
		return credential.Outcome{}, err
	}
	return out, st.Promote(ctx, k, store.Key{Credential: k.Credential})
}

// note checks that a minted secret could be stored, and counts what the issuer holds before the mint. What the issuer shows as
// ours and the record does not know is an orphan, and removed.
func (r *run) note(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, st, err := r.tools(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	if err := st.Writable(ctx, string(r.record.ID)); err != nil {
		return credential.Outcome{}, err
	}
	census, err := rot.Inspect(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	out := finished()
	for _, v := range census {
		if v.Ours && !r.knows(v.ID) { // a mint of ours that arrived after its generation was given up
			if err := errors.Join(rot.Disable(ctx, e.Op, v.ID), rot.Delete(ctx, e.Op, v.ID)); err != nil {
				return credential.Outcome{}, err
			}
			out.Detail += fmt.Sprintf("removed our orphan %s; ", v.ID)
			continue
		}
		out.Versions = append(out.Versions, v.ID)
	}
	out.Foreign = r.foreign(census)
	return out, nil
}

// foreign lists the enabled versions that are neither ours by the issuer's word nor by the record's.
func (r *run) foreign(census []rotators.VersionInfo) []string {
	ids := []string{}
	for _, v := range census {
		if v.Enabled && !v.Ours && !r.knows(v.ID) {
			ids = append(ids, string(v.ID))
		}
	}
	return ids
}

func (r *run) knows(id rotators.VersionID) bool {
	same := func(v credential.Version) bool { return v.ID == id }
	return slices.ContainsFunc(r.record.Live(), same) || slices.ContainsFunc(r.record.Dead, same)
}

func (r *run) mint(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, err := r.issuer(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	v, err := rot.Apply(ctx, e.Op, rotators.Material{})
	if err != nil {
		return credential.Outcome{}, err
	}
	if v.ID == "" || v.Material.Empty() {
		return credential.Outcome{}, rotators.Faultf(rotators.Unsure, "mint", "the issuer answered without an id or a secret")
	}
	r.minted = v.Material
	out := finished()
	out.Version = v.ID
	return out, nil
}

// attribute finds the version of a mint whose reply was lost. Where the issuer shows no op, only an exclusive target with exactly
// one unknown, never used version since the census is good enough: anything else could be somebody's key.
func (r *run) attribute(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, err := r.issuer(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	census, err := rot.Inspect(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	var unknown []rotators.VersionInfo
	for _, v := range census {
		if v.OpID == e.Op.ID {
			return credential.Outcome{Result: credential.Found, Version: v.ID}, nil
		}
		if !r.knows(v.ID) && !slices.Contains(r.record.Noted, v.ID) {
			unknown = append(unknown, v)
		}
	}
	switch {
	case rot.Traits().Tagged, len(unknown) == 0:
		return credential.Outcome{Result: credential.Nothing}, nil
	case len(unknown) == 1 && r.record.Spec.Exclusive && r.plausible(unknown[0]):
		return credential.Outcome{Result: credential.Found, Version: unknown[0].ID, Detail: "the only unknown version of an exclusive target"}, nil
	}
	var ids []string
	for _, v := range unknown {
		ids = append(ids, string(v.ID))
	}
	return credential.Outcome{Result: credential.Ambiguous, Message: fmt.Sprintf(
		"a mint's reply was lost and these versions could be it: %s; delete the one that nobody uses at the issuer, then resume",
		strings.Join(ids, ", "))}, nil
}

// plausible: made since the census and never used, as far as the issuer tells.
func (r *run) plausible(v rotators.VersionInfo) bool {
	if v.CreatedAt.IsZero() || !v.LastUsedAt.IsZero() {
		return false
	}
	return !v.CreatedAt.Before(r.record.NotedAt.Add(-clockTolerance)) && !v.CreatedAt.After(r.Now().Add(clockTolerance))
}

// stage makes the candidate's secret durable before anything else depends on it.
func (r *run) stage(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	st, err := r.store()
	if err != nil {
		return credential.Outcome{}, err
	}
	k := r.key(e.Version)
	pending, err := st.Get(ctx, k.Credential, store.Pending)
	switch {
	case err == nil && pending.Key.Same(k): // from before a crash
		r.minted = rotators.Material{}
		return credential.Outcome{Result: credential.Done, Version: pending.Key.Version}, nil
	case err != nil && !errors.Is(err, store.ErrNotFound):
		return credential.Outcome{}, err
	}
	m := r.minted
	if r.record.Plan == credential.Minted {
		if m.Empty() {
			return credential.Outcome{Result: credential.Lost, Message: "the minted secret died with the worker that held it; its version is withdrawn"}, nil
		}
	} else if k.Version, m, err = r.compose(ctx, e.Op); err != nil {
		return credential.Outcome{}, err
	}
	held, err := st.Stage(ctx, store.Secret{Key: k, Material: m})
	if err != nil {
		return credential.Outcome{}, err
	}
	r.minted = rotators.Material{}
	return credential.Outcome{Result: credential.Done, Version: held.Key.Version}, nil
}

func (r *run) compose(ctx context.Context, op rotators.Op) (rotators.VersionID, rotators.Material, error) {
	rot, err := r.issuer(ctx)
	if err != nil {
		return "", rotators.Material{}, err
	}
	c, ok := rot.(rotators.Composer)
	if !ok {
		return "", rotators.Material{}, rotators.Faultf(rotators.Refused, "compose", "kind %s neither mints nor composes", r.record.Spec.Kind)
	}
	var inUse []rotators.VersionID
	if r.record.Plan != credential.InPlace {
		for _, v := range r.record.Live() {
			inUse = append(inUse, v.ID)
		}
	}
	return c.Compose(op, inUse, r.Random)
}

// pending reads the candidate's secret. That it is gone is for a human: it may be applied already.
func (r *run) pending(ctx context.Context, st store.Store, k store.Key) (store.Secret, error) {
	s, err := st.Get(ctx, k.Credential, store.Pending)
	if err == nil && !s.Key.Same(k) {
		err = rotators.Faultf(rotators.Refused, "read pending secret", "the store holds generation %d, wanted %d", s.Key.Generation, k.Generation)
	}
	return s, err
}

func (r *run) apply(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, st, err := r.tools(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	s, err := r.pending(ctx, st, r.key(e.Version))
	if err != nil {
		return credential.Outcome{}, err
	}
	out := finished()
	out.Performed = r.Now()
	v, err := rot.Apply(ctx, e.Op, s.Material)
	if err != nil {
		return credential.Outcome{}, err
	}
	if v.ID != e.Version.ID {
		return credential.Outcome{}, rotators.Faultf(rotators.Refused, "apply", "wrote version %q, intended %q", v.ID, e.Version.ID)
	}
	return out, nil
}

// prove logs in as the candidate.
func (r *run) prove(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, st, err := r.tools(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	s, err := r.pending(ctx, st, r.key(e.Version))
	if err != nil {
		return credential.Outcome{}, err
	}
	return verdict(rot.Prove(ctx, e.Op, e.Version.ID, s.Material))
}

// verdict turns a proof into an outcome. Unknown with an error of class Refused is a failure that no retry mends.
func verdict(v rotators.Verdict, err error) (credential.Outcome, error) {
	switch v {
	case rotators.Accepted:
		return credential.Outcome{Result: credential.Accepted}, nil
	case rotators.Rejected:
		return credential.Outcome{Result: credential.Rejected}, nil
	}
	if err == nil {
		return credential.Outcome{Result: credential.Unknown, Message: "the issuer gave no verdict"}, nil
	}
	if rotators.ClassOf(err) == rotators.Refused {
		return credential.Outcome{}, err
	}
	return credential.Outcome{
		Result: credential.Unknown, Class: rotators.ClassOf(err), RetryAfter: rotators.RetryAfterOf(err), Message: err.Error(),
	}, nil
}

func (r *run) promote(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	st, err := r.store()
	if err != nil {
		return credential.Outcome{}, err
	}
	to := r.key(e.Version)
	err = st.Promote(ctx, to, r.publishedKey(r.record.Published))
	for _, p := range r.record.Doubtful { // a kill overtook the promote of p: it may have happened
		if err == nil || rotators.ClassOf(err) != rotators.Conflict {
			break
		}
		err = st.Promote(ctx, to, r.publishedKey(p))
	}
	return finished(), err
}

// revert stages the previous secret as a new generation, so that a rollback is a promote like any other.
func (r *run) revert(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	st, err := r.store()
	if err != nil {
		return credential.Outcome{}, err
	}
	k := r.key(e.Version)
	previous, err := st.Get(ctx, k.Credential, store.Previous)
	if errors.Is(err, store.ErrNotFound) || err == nil && previous.Key.Version != k.Version {
		return credential.Outcome{Result: credential.Lost, Message: "the store holds no previous secret to go back to"}, nil
	}
	if err != nil {
		return credential.Outcome{}, err
	}
	_, err = st.Stage(ctx, store.Secret{Key: k, Material: previous.Material})
	return finished(), err
}
