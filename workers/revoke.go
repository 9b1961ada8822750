package workers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

// clockTolerance is how far the issuer's clock may be from ours when a lost mint is attributed.
const clockTolerance = 2 * time.Minute

// storePatience bounds a store read during an emergency, which never waits for a store.
const storePatience = 5 * time.Second

// retire performs one idempotent change on the version that goes out of service.
func (r *run) retire(ctx context.Context, change func(rotators.Rotator) error) (credential.Outcome, error) {
	rot, err := r.issuer(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	return finished(), change(rot)
}

// proveDead logs in with the old secret. Where the store has lost it, the issuer's census has to do.
func (r *run) proveDead(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, st, err := r.tools(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	previous, err := st.Get(ctx, string(r.record.ID), store.Previous)
	switch {
	case err == nil && previous.Key.Version == e.Version.ID:
		return verdict(rot.Prove(ctx, e.Op, e.Version.ID, previous.Material))
	case err != nil && !errors.Is(err, store.ErrNotFound):
		return credential.Outcome{}, err
	}
	live, err := enabled(ctx, rot)
	if err != nil {
		return credential.Outcome{}, err
	}
	if slices.Contains(live, e.Version.ID) {
		return credential.Outcome{Result: credential.Accepted, Message: "the issuer still lets it in"}, nil
	}
	return credential.Outcome{Result: credential.Lost, Message: "no stored secret to log in with; the issuer lists the version as disabled or gone"}, nil
}

func enabled(ctx context.Context, rot rotators.Rotator) ([]rotators.VersionID, error) {
	census, err := rot.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	var ids []rotators.VersionID
	for _, v := range census {
		if v.Enabled {
			ids = append(ids, v.ID)
		}
	}
	return ids, nil
}

// destroy removes the previous secret from the store, whichever it was.
func (r *run) destroy(ctx context.Context) (credential.Outcome, error) {
	st, err := r.store()
	if err != nil {
		return credential.Outcome{}, err
	}
	for _, p := range append([]credential.Published{r.record.Previous}, r.record.Doubtful...) {
		if p.Generation == 0 {
			continue
		}
		if err := st.Destroy(ctx, r.publishedKey(p)); err != nil {
			return credential.Outcome{}, err
		}
	}
	return finished(), nil
}

// withdraw removes a candidate that no consumer ever read.
func (r *run) withdraw(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, err := r.issuer(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	if err := rot.Disable(ctx, e.Op, e.Version.ID); err != nil {
		return credential.Outcome{}, err
	}
	return finished(), rot.Delete(ctx, e.Op, e.Version.ID)
}

func (r *run) discard(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	st, err := r.store()
	if err != nil {
		return credential.Outcome{}, err
	}
	return finished(), st.Discard(ctx, r.key(e.Version))
}

// kill disables what the record knows first, then whatever else the issuer shows as ours. One failure never spares the others.
func (r *run) kill(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, err := r.issuer(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	out := finished()
	var failed []error
	disable := func(id rotators.VersionID) {
		if slices.Contains(out.Versions, id) {
			return
		}
		out.Versions = append(out.Versions, id)
		if err := rot.Disable(ctx, e.Op, id); err != nil {
			failed = append(failed, err)
		}
	}
	for _, v := range e.Versions {
		disable(v.ID)
	}
	census, err := rot.Inspect(ctx)
	if err != nil {
		return credential.Outcome{}, errors.Join(append(failed, err)...)
	}
	out.Foreign = []string{}
	for _, v := range census {
		switch {
		case !v.Enabled || slices.Contains(out.Versions, v.ID):
		case v.Ours || r.lateMint(v):
			disable(v.ID)
		default:
			out.Foreign = append(out.Foreign, string(v.ID))
		}
	}
	if len(failed) > 0 {
		return credential.Outcome{}, errors.Join(failed...)
	}
	out.Detail = fmt.Sprintf("disabled %v", out.Versions)
	if len(out.Foreign) > 0 {
		out.Detail += "; foreign, not touched: " + strings.Join(out.Foreign, ", ")
	}
	return out, nil
}

// lateMint: a mint was under way when the kill came, and this is what it made.
func (r *run) lateMint(v rotators.VersionInfo) bool {
	return !r.record.NotedAt.IsZero() && r.record.Spec.Exclusive && !slices.Contains(r.record.Noted, v.ID) && r.plausible(v)
}

// proveKill logs in with every stored secret of the killed versions. A store that does not answer delays nothing: the kill is then
// confirmed by the issuer, and not proven.
func (r *run) proveKill(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, err := r.issuer(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	secrets, problem := r.stored(ctx)
	proven := map[rotators.VersionID]bool{}
	unknown := credential.Outcome{}
	for _, s := range secrets {
		if !slices.ContainsFunc(e.Versions, func(v credential.Version) bool { return v.ID == s.Key.Version }) {
			continue
		}
		out, err := verdict(rot.Prove(ctx, e.Op, s.Key.Version, s.Material))
		switch {
		case err != nil:
			return credential.Outcome{}, err
		case out.Result == credential.Accepted:
			return credential.Outcome{Result: credential.Accepted, Message: "version " + string(s.Key.Version) + " still logs in"}, nil
		case out.Result == credential.Unknown:
			unknown = out
		default:
			proven[s.Key.Version] = true
		}
	}
	if unknown.Result != "" {
		return unknown, nil
	}
	suspects, err := r.suspects(ctx, rot)
	if err != nil {
		return credential.Outcome{}, err
	}
	if len(suspects) > 0 {
		return credential.Outcome{Result: credential.Lost, Message: fmt.Sprintf(
			"a mint was under way when the order came, and these enabled versions may be what it made: %s; delete those that are nobody's", strings.Join(suspects, ", "))}, nil
	}
	var left []string
	for _, v := range e.Versions {
		if !proven[v.ID] {
			left = append(left, string(v.ID))
		}
	}
	if len(left) == 0 {
		return credential.Outcome{Result: credential.Rejected}, nil
	}
	message := "disabled at the issuer, not proven by login: no stored secret for " + strings.Join(left, ", ")
	if problem != nil {
		message += " (" + problem.Error() + ")"
	}
	return credential.Outcome{Result: credential.Lost, Message: message}, nil
}

// suspects are enabled versions that a mint which the kill overtook may have made, and that nothing shows to be ours.
func (r *run) suspects(ctx context.Context, rot rotators.Rotator) ([]string, error) {
	if r.record.NotedAt.IsZero() {
		return nil, nil
	}
	census, err := rot.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, v := range census {
		if v.Enabled && !r.knows(v.ID) && !slices.Contains(r.record.Noted, v.ID) {
			ids = append(ids, string(v.ID))
		}
	}
	return ids, nil
}

// removeStray takes a version out of service that this pass minted and no record knows. The intent to mint is its audit entry.
func (r *run) removeStray(ctx context.Context, id rotators.VersionID) error {
	ctx, cancel := context.WithTimeout(ctx, r.record.Spec.StepDeadline.D())
	defer cancel()
	r.minted = rotators.Material{}
	rot, err := r.issuer(ctx)
	if err != nil {
		return err
	}
	op := r.record.Op()
	err = r.attempt(ctx, credential.Withdrawing, func(ctx context.Context) error {
		return errors.Join(rot.Disable(ctx, op, id), rot.Delete(ctx, op, id))
	})
	if err != nil {
		return fmt.Errorf("remove the minted version %s, which nobody will use: %w", id, err)
	}
	r.log.Warn("a minted version that no record knows was removed", "version", string(id), "generation", op.Generation)
	return nil
}

// stored reads every stage that answers in time, and the first problem.
func (r *run) stored(ctx context.Context) ([]store.Secret, error) {
	st, err := r.store()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	var secrets []store.Secret
	var problem error
	for _, stage := range []store.Stage{store.Current, store.Pending, store.Previous} {
		s, err := st.Get(ctx, string(r.record.ID), stage)
		switch {
		case err == nil:
			secrets = append(secrets, s)
		case !errors.Is(err, store.ErrNotFound) && problem == nil:
			problem = err
		}
	}
	return secrets, problem
}

// clear deletes the killed versions, so that restore finds free slots.
func (r *run) clear(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	rot, err := r.issuer(ctx)
	if err != nil {
		return credential.Outcome{}, err
	}
	for _, v := range e.Versions {
		if err := rot.Delete(ctx, e.Op, v.ID); err != nil {
			return credential.Outcome{}, err
		}
	}
	return finished(), nil
}
