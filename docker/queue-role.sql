-- The database role of the workers. It sees the queue; the registry's tables it does not: a worker reads and writes
-- the registry through the API, with a token. Run after every migration, it covers what that has added.
\getenv password QUEUE_PASSWORD

select 'create role tpv_worker' where not exists (select from pg_roles where rolname = 'tpv_worker') \gexec
alter role tpv_worker login password :'password';

grant usage on schema procrastinate to tpv_worker;
grant select, insert, update, delete on all tables in schema procrastinate to tpv_worker;
grant usage on all sequences in schema procrastinate to tpv_worker;
