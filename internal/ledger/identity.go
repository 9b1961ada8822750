package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
)

// identityFile holds the seeds from which every identity of the embedded server is derived. It is written once.
const identityFile = "identity.json"

// seeds are the private keys of the embedded server, as the file holds them.
type seeds struct {
	Operator string `json:"operator"`
	System   string `json:"system"`
	Account  string `json:"account"`
	Engine   string `json:"engine"`
}

// identity is the embedded server's operator, its two accounts and the engine's user.
type identity struct {
	operator, system, account nkeys.KeyPair
	engine                    nkeys.KeyPair
}

// loadIdentity reads the identity in dir, or makes one if the server has no data yet. Data without identity is refused: under
// new keys the server would not see it, and would begin an empty ledger beside it.
func loadIdentity(dir, storeDir string) (identity, error) {
	path := filepath.Join(dir, identityFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if entries, err := os.ReadDir(storeDir); err == nil && len(entries) > 0 {
			return identity{}, fmt.Errorf("%s is missing although %s holds data: restore it, or the ledger cannot be read", path, storeDir)
		}
		if b, err = newSeeds(); err == nil {
			err = writeFile(path, b)
		}
	}
	if err != nil {
		return identity{}, err
	}
	s, err := decode[seeds](b)
	if err != nil {
		return identity{}, fmt.Errorf("%s is damaged: %w", path, err)
	}
	var id identity
	for _, k := range []struct {
		to   *nkeys.KeyPair
		seed string
		kind nkeys.PrefixByte
	}{
		{&id.operator, s.Operator, nkeys.PrefixByteOperator}, {&id.system, s.System, nkeys.PrefixByteAccount},
		{&id.account, s.Account, nkeys.PrefixByteAccount}, {&id.engine, s.Engine, nkeys.PrefixByteUser},
	} {
		kind, _, err := nkeys.DecodeSeed([]byte(k.seed))
		if err == nil && kind != k.kind {
			err = errors.New("a seed is of the wrong kind")
		}
		if err == nil {
			*k.to, err = nkeys.FromSeed([]byte(k.seed))
		}
		if err != nil {
			return identity{}, fmt.Errorf("%s is damaged: %w", path, err)
		}
	}
	return id, nil
}

func newSeeds() ([]byte, error) {
	var errs []error
	seed := func(create func() (nkeys.KeyPair, error)) string {
		kp, err := create()
		if err != nil {
			errs = append(errs, err)
			return ""
		}
		b, err := kp.Seed()
		errs = append(errs, err)
		return string(b)
	}
	s := seeds{
		Operator: seed(nkeys.CreateOperator), System: seed(nkeys.CreateAccount),
		Account: seed(nkeys.CreateAccount), Engine: seed(nkeys.CreateUser),
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("make identities: %w", err)
	}
	return json.Marshal(s)
}

// claims encodes what the server has to know: the operator and both accounts.
func (id identity) claims() (operator *jwt.OperatorClaims, accounts map[string]string, system string, err error) {
	op, err := id.operator.PublicKey()
	if err != nil {
		return nil, nil, "", err
	}
	if system, err = id.system.PublicKey(); err != nil {
		return nil, nil, "", err
	}
	pub, err := id.account.PublicKey()
	if err != nil {
		return nil, nil, "", err
	}
	oc := jwt.NewOperatorClaims(op)
	oc.Name, oc.SystemAccount = "rekey", system
	token, err := oc.Encode(id.operator)
	if err != nil {
		return nil, nil, "", err
	}
	if operator, err = jwt.DecodeOperatorClaims(token); err != nil {
		return nil, nil, "", err
	}
	sys := jwt.NewAccountClaims(system)
	sys.Name = "system"
	ac := jwt.NewAccountClaims(pub)
	ac.Name = "rekey"
	ac.Limits.JetStreamLimits = jwt.JetStreamLimits{
		MemoryStorage: jwt.NoLimit, DiskStorage: jwt.NoLimit, Streams: jwt.NoLimit, Consumer: jwt.NoLimit, MaxAckPending: jwt.NoLimit,
	}
	accounts = map[string]string{}
	for _, c := range []*jwt.AccountClaims{sys, ac} {
		if accounts[c.Subject], err = c.Encode(id.operator); err != nil {
			return nil, nil, "", err
		}
	}
	return operator, accounts, system, nil
}

// creds makes a creds file for user: empty permissions allow everything in the account.
func (id identity) creds(name string, user nkeys.KeyPair, p jwt.Permissions) ([]byte, error) {
	pub, err := user.PublicKey()
	if err != nil {
		return nil, err
	}
	seed, err := user.Seed()
	if err != nil {
		return nil, err
	}
	uc := jwt.NewUserClaims(pub)
	uc.Name, uc.Permissions = name, p
	token, err := uc.Encode(id.account)
	if err != nil {
		return nil, err
	}
	return jwt.FormatUserConfig(token, seed)
}

// ConsumerDurable is the name of the durable consumer of EventStream that a consumer's identity may create and read for one
// credential. Its characters cannot be confused with those of the parts.
func ConsumerDurable(consumer string, id credential.ID) string {
	return consumer + "=" + id.Team() + "=" + id.Name()
}

// ConsumerInbox is the inbox prefix that a consumer's identity may listen on; it has to be set on its connection.
func ConsumerInbox(consumer string) string { return "_INBOX_" + consumer }

// ConsumerPermissions let a consumer read the events of the listed credentials and acknowledge them, and nothing else.
func ConsumerPermissions(consumer string, ids []credential.ID) (jwt.Permissions, error) {
	var p jwt.Permissions
	if err := checkToken("consumer", consumer); err != nil {
		return p, err
	}
	if len(ids) == 0 {
		return p, fmt.Errorf("consumer %s: no credentials", consumer)
	}
	p.Sub.Allow.Add(ConsumerInbox(consumer) + ".>")
	for _, id := range ids {
		if err := checkID(id); err != nil {
			return p, err
		}
		durable := ConsumerDurable(consumer, id)
		p.Pub.Allow.Add(
			ackPrefix+id.Token()+"."+consumer,
			"$JS.API.CONSUMER.CREATE."+EventStream+"."+durable+"."+events.SubjectFor("", id.Team(), id.Name()),
			"$JS.API.CONSUMER.INFO."+EventStream+"."+durable,
			"$JS.API.CONSUMER.MSG.NEXT."+EventStream+"."+durable,
			"$JS.ACK."+EventStream+"."+durable+".>",
		)
	}
	return p, nil
}

// writeFile makes path durable with mode 0600, whole or not at all.
func writeFile(path string, data []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // renamed, unless something failed
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
