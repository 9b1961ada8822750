package rotatortest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

// MintedConfig describes a fake issuer that mints, like a cloud's access keys. The zero value holds two versions, disabled ones
// counted, and shows nobody's tag.
type MintedConfig struct {
	// Credential is whose versions count as ours.
	Credential string
	// Limit is how many versions it holds at once, disabled and foreign ones included; 2 if zero.
	Limit int
	// Tagged lets a version show the op that made it.
	Tagged bool
	// Settle is how long a new version is refused at first; Residual and KeepsSessions show in the traits.
	Settle, Residual time.Duration
	// KeepsSessions means that Disable does not end sessions.
	KeepsSessions bool
	// Now is the clock of creation and last use; time.Now if nil.
	Now func() time.Time
	// Seed makes ids and secrets, the same ones for the same seed.
	Seed string
}

// FakeMinted is an issuer in memory together with its rotator. It keeps what a real one keeps and forgets what a real one
// forgets: a secret is shown once. It is safe for concurrent use and inside a testing/synctest bubble.
type FakeMinted struct {
	Wire
	cfg MintedConfig

	mu       sync.Mutex
	minted   int
	versions []*mintedVersion
}

type mintedVersion struct {
	info     rotators.VersionInfo
	secret   string
	tag      rotators.Op
	settled  time.Time
	sessions []*FakeSession
}

var _ rotators.Rotator = (*FakeMinted)(nil)

// NewFakeMinted makes an issuer without versions.
func NewFakeMinted(cfg MintedConfig) *FakeMinted {
	if cfg.Limit == 0 {
		cfg.Limit = 2
	}
	cfg.Now = clock(cfg.Now)
	return &FakeMinted{cfg: cfg}
}

// Traits follow the configuration. Nothing is ever written twice to one id, so there is no fence.
func (f *FakeMinted) Traits() rotators.Traits {
	return rotators.Traits{
		MaxLive: f.cfg.Limit, Minted: true, Countable: true, Kills: !f.cfg.KeepsSessions, Unfenced: true,
		Tagged: f.cfg.Tagged, Settle: f.cfg.Settle, Residual: f.cfg.Residual,
	}
}

// Apply mints. Where versions are tagged, a repeat finds the one that it made and is Unsure; otherwise it mints another, as
// such issuers do.
func (f *FakeMinted) Apply(ctx context.Context, op rotators.Op, _ rotators.Material) (rotators.Version, error) {
	c := Call{Method: Apply, Op: op}
	if err := f.send(ctx, c); err != nil {
		return rotators.Version{}, err
	}
	v, err := f.mint(c, op)
	if err := f.reply(ctx, c, err); err != nil {
		return rotators.Version{}, err
	}
	return v, nil
}

func (f *FakeMinted) mint(c Call, op rotators.Op) (rotators.Version, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v := range f.versions {
		if f.cfg.Tagged && v.tag.ID == op.ID && v.tag.Credential == op.Credential {
			return rotators.Version{}, rotators.Faultf(rotators.Unsure, c.step(), "%s was minted by this op already, and its secret cannot be shown again", v.info.ID)
		}
	}
	if len(f.versions) >= f.cfg.Limit {
		return rotators.Version{}, rotators.Faultf(rotators.Refused, c.step(), "it holds %d versions, and no more are allowed", len(f.versions))
	}
	v := f.add(op)
	return rotators.Version{ID: v.info.ID, Material: material(v)}, nil
}

// add makes a version; the caller holds mu.
func (f *FakeMinted) add(tag rotators.Op) *mintedVersion {
	f.minted++
	now := f.cfg.Now()
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%d", f.cfg.Seed, f.cfg.Credential, f.minted))
	text := hex.EncodeToString(sum[:])
	v := &mintedVersion{secret: text[16:], tag: tag, settled: now.Add(f.cfg.Settle), info: rotators.VersionInfo{
		ID: rotators.VersionID(fmt.Sprintf("KEY%03d%s", f.minted, text[:6])), Enabled: true, CreatedAt: now,
	}}
	f.versions = append(f.versions, v)
	return v
}

func material(v *mintedVersion) rotators.Material {
	return rotators.Text(map[string]string{rotators.FieldAccessKeyID: string(v.info.ID), rotators.FieldSecretKey: v.secret})
}

// Prove accepts an enabled version's secret, once it has settled.
func (f *FakeMinted) Prove(ctx context.Context, op rotators.Op, id rotators.VersionID, m rotators.Material) (rotators.Verdict, error) {
	c := Call{Method: Prove, Op: op, ID: id}
	if err := f.send(ctx, c); err != nil {
		return rotators.Unknown, err
	}
	v := f.login(m)
	verdict := rotators.Rejected
	if v != nil && v.info.ID == id {
		verdict = rotators.Accepted
	}
	if err := f.reply(ctx, c, nil); err != nil {
		return rotators.Unknown, err
	}
	return verdict, nil
}

// login is the version whose secret m holds, if it may log in now.
func (f *FakeMinted) login(m rotators.Material) *mintedVersion {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.cfg.Now()
	for _, v := range f.versions {
		if v.secret == string(m.Reveal(rotators.FieldSecretKey)) && string(v.info.ID) == string(m.Reveal(rotators.FieldAccessKeyID)) &&
			v.info.Enabled && !now.Before(v.settled) {
			v.info.LastUsedAt = now
			return v
		}
	}
	return nil
}

// Open logs in as a consumer. It fails if the issuer refuses.
func (f *FakeMinted) Open(_ context.Context, m rotators.Material) (Session, error) {
	v := f.login(m)
	if v == nil {
		return nil, fmt.Errorf("login as %s: refused", m.Reveal(rotators.FieldAccessKeyID))
	}
	s := &FakeSession{}
	f.mu.Lock()
	defer f.mu.Unlock()
	v.sessions = append(v.sessions, s)
	return s, nil
}

// Disable refuses logins and ends sessions, unless the configuration keeps them.
func (f *FakeMinted) Disable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	return f.change(ctx, Call{Disable, op, id}, func(v *mintedVersion) { v.info.Enabled = false; f.end(v) })
}

// Enable undoes Disable.
func (f *FakeMinted) Enable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	return f.change(ctx, Call{Enable, op, id}, func(v *mintedVersion) { v.info.Enabled = true })
}

// Delete removes the version, which makes room for another.
func (f *FakeMinted) Delete(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	return f.change(ctx, Call{Delete, op, id}, func(v *mintedVersion) {
		f.end(v)
		for i, w := range f.versions {
			if w == v {
				f.versions = append(f.versions[:i:i], f.versions[i+1:]...)
				return
			}
		}
	})
}

func (f *FakeMinted) end(v *mintedVersion) {
	if f.cfg.KeepsSessions {
		return
	}
	for _, s := range v.sessions {
		s.Close()
	}
	v.sessions = nil
}

func (f *FakeMinted) change(ctx context.Context, c Call, do func(*mintedVersion)) error {
	if err := f.send(ctx, c); err != nil {
		return err
	}
	return f.reply(ctx, c, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, v := range f.versions {
			if v.info.ID != c.ID {
				continue
			}
			if f.cfg.Tagged && v.tag.Credential != c.Op.Credential {
				return rotators.Faultf(rotators.Refused, c.step(), "the version is not tagged as ours")
			}
			do(v)
			return nil
		}
		if c.Method == Enable {
			return rotators.Faultf(rotators.Refused, c.step(), "there is no such version")
		}
		return nil
	}())
}

// Inspect is the census over the wire.
func (f *FakeMinted) Inspect(ctx context.Context) ([]rotators.VersionInfo, error) {
	c := Call{Method: Inspect}
	if err := f.send(ctx, c); err != nil {
		return nil, err
	}
	infos := f.Census()
	if err := f.reply(ctx, c, nil); err != nil {
		return nil, err
	}
	return infos, nil
}

// Census is the same without the wire: the truth, for an oracle.
func (f *FakeMinted) Census() []rotators.VersionInfo {
	f.mu.Lock()
	defer f.mu.Unlock()
	infos := []rotators.VersionInfo{}
	for _, v := range f.versions {
		i := v.info
		for _, s := range v.sessions {
			if s.Alive() {
				i.Sessions++
			}
		}
		if f.cfg.Tagged && v.tag.Credential == f.cfg.Credential && v.tag.ID != uuid.Nil {
			i.Ours, i.Generation, i.Epoch, i.OpID = true, v.tag.Generation, v.tag.Epoch, v.tag.ID
		}
		infos = append(infos, i)
	}
	return infos
}

// AddForeign makes an enabled version that somebody else made, and which works at once. It takes a place even beyond the limit.
func (f *FakeMinted) AddForeign() (rotators.VersionID, rotators.Material) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.add(rotators.Op{})
	v.settled = v.info.CreatedAt
	return v.info.ID, material(v)
}

// Close does nothing.
func (f *FakeMinted) Close() error { return nil }
